"""How many clusters explain a tile's features: the counts, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from demo import photographs, variance


def test_four_kinds_of_features_are_four_clusters() -> None:
    torch.manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(4, 32), dim=-1)
    tile = kinds.repeat_interleave(10, 0) + 0.001 * torch.randn(40, 32)
    assert variance.fewest(40, lambda k: variance.k_means(tile, k), 0.99) == 4
    assert variance.fewest_of_clusters(tile) == [4, 4]
    assert variance.explained(tile, torch.arange(40) // 10) > 0.999
    assert variance.explained(tile, torch.zeros(40, dtype=torch.long)) == pytest.approx(0, abs=1e-5)


def test_fewest_is_the_first_that_explains_enough() -> None:
    assert variance.fewest(100, lambda k: k / 100, 0.95) == 95
    assert variance.fewest(7, lambda k: 1.0, 0.95) == 1


@pytest.mark.parametrize("images", ["0", "-1", "15"])
def test_more_photographs_than_there_are_are_refused(tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        variance.main(["--output", str(tmp_path), "--images", images])
    assert f"--images {images}: there are 14 photographs" in capsys.readouterr().err


def test_photographs_are_cut_into_four_tiles() -> None:
    shown = list(variance.whole_photographs())
    assert len(shown) == len(photographs.NAMES["test"])
    assert {image.size for _, image in shown} == {(224, 224)}


def test_a_small_run_writes_its_page(tmp_path: Path) -> None:
    assert variance.main(["--output", str(tmp_path), "--images", "1"]) == 0
    report = json.loads((tmp_path / "variance.json").read_text())
    page = (tmp_path / "variance.md").read_text()
    for name, tokens in (("demo/model", 65), ("demo/photo-model", 257)):
        (photograph,) = report["models"][name]["photographs"]
        assert photograph["features_a_tile"] == tokens
        assert len(photograph["tiles"]) == 4
        for tile in photograph["tiles"]:
            assert all(1 <= low <= high <= tokens for low, high in tile.values())
        left = [photograph["whole"][likeness]["clusters"] for likeness in ("0.9", "0.8", "0.7")]
        assert left == sorted(left, reverse=True)
        assert f"| {name} | 1 photographs | {tokens} |" in page
    assert "| astronaut |" in page


def test_the_committed_page_says_what_its_numbers_say() -> None:
    folder = Path(variance.__file__).parent / "results"
    report = json.loads((folder / "variance.json").read_text())
    assert (folder / "variance.md").read_text() == variance.markdown(report)
    for folder in variance.MODELS.values():
        measured = report["models"][f"demo/{folder.name}"]["model_sha256"]
        assert measured == variance.sha256(folder / "model.safetensors"), "make demo-variance"
