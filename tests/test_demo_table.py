"""The measured table: its columns, its controls, its page, and that it continues where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo import answerer, table
from demo.shards import EASY_VQA_QUESTIONS, Row
from pipeline.engine import Answer
from trimming import Grid, KeepAll, Policy, Random, TrimmedLlama
from trimming.engine import Statistics

MODEL = table.ROOT / "demo/model"
RESULTS = table.ROOT / "demo/results"
ANEW = "`make demo-table` measures anew what lies in demo/results (some minutes)"


class FakeAnswerer:
    """Answers color questions rightly and others wrongly, keeps half unless told to keep all, and sees as many tiles as the
    scene's number."""

    calls: list[str]
    fail_at: str | None = None

    def __init__(self, _: Path) -> None:
        FakeAnswerer.calls = []

    def engine(self, policy: Policy, tower_tiles: str) -> Any:
        FakeAnswerer.calls.append(repr(policy) + (", real tiles" if tower_tiles == "real" else ""))
        if FakeAnswerer.fail_at and FakeAnswerer.fail_at in repr(policy):
            raise KeyboardInterrupt
        seconds = {"tower": 3.0 if tower_tiles == "real" else 12.0}
        return SimpleNamespace(batch=SimpleNamespace(policy=policy, seconds=seconds, statistics=Statistics(images_encoded=4)))

    def answer(self, engine: Any, rows: list[Row]) -> Iterator[answerer.Answered]:
        kept = 64 if isinstance(engine.batch.policy, KeepAll) else 32
        for row in rows:
            said = Answer(
                text=row.answer if row.kind == "color" else "no such answer",
                finish_reason="stop",
                prompt_tokens=9,
                output_tokens=3,
                visual_tokens=64,
                kept_visual_tokens=kept,
                keep_fraction=kept / 64,
                cross_kv_bytes_full=64,
                cross_kv_bytes=kept,
                self_kv_bytes=1,
                kept=[],
            )
            yield answerer.Answered(row, said, 1 + int(row.id.split("/")[2]) if row.id.startswith("scenes/") else 1)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(answerer, "Answerer", FakeAnswerer)
    monkeypatch.setattr(FakeAnswerer, "fail_at", None)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return ["--model", str(tmp_path), "--output", str(tmp_path / "results"), "--easy-vqa", "50", "--scenes", "4"]


def test_columns_are_full_then_each_k_with_its_controls() -> None:
    assert list(table.labels())[:5] == ["full", "real-tiles", "trimmed-llama 0.25", "random 0.25", "grid 0.25"]
    assert len(list(table.labels())) == 11
    assert [label for label in table.labels() if table.tower_tiles_of(label) == "real"] == ["real-tiles"]


def test_controls_take_the_kept_fraction_that_was_measured() -> None:
    results = {"trimmed-llama 0.15": {"keep_fraction": 0.4567}}
    assert table.policy_of("full", results) == table.policy_of("real-tiles", results) == KeepAll()
    assert table.policy_of("trimmed-llama 0.15", results) == TrimmedLlama(k_ratio=0.15)
    assert table.policy_of("random 0.15", results) == Random(keep=0.4567)
    assert table.policy_of("grid 0.15", results) == Grid(keep=0.4567)


def test_report_and_page(arguments: list[str], tmp_path: Path) -> None:
    assert table.main(arguments) == 0
    report = json.loads((tmp_path / "results/accuracy.json").read_text())
    assert set(report["results"]) == {"easy-vqa-test", "scenes-test"}
    scenes = report["results"]["scenes-test"]
    assert list(scenes) == list(table.labels())
    assert scenes["full"]["kinds"]["color"] == {"rows": 4, "right": 4}
    assert scenes["full"]["rows"] == 24
    assert scenes["full"]["tiles"] == {str(count): {"rows": 6, "right": 1} for count in (1, 2, 3, 4)}
    assert scenes["full"]["accuracy"] == round(1 / 6, 4)
    assert scenes["random 0.05"]["policy"] == "Random(keep=0.5, seed=0)"
    assert report["conditions"]["dtype"] == "float32"
    page = (tmp_path / "results/accuracy.md").read_text()
    assert "| question | rows | full | real tiles | K = 0.25 | random |" in page
    assert "| color | 4 | 100.0 |" in page
    assert "| on images of 3 tiles | 6 | 16.7 |" in page
    assert "easy-vqa-test (50 on 1 tile): the tower takes 12.0 s for its 4 images, 3.0 s with real tiles." in page
    assert "| all but captions | 20 | 20.0 |" in page
    assert "| features kept |  | 100.0 | 100.0 | 50.0 |" in page
    assert "- full: caption 0.0, count 0.0, letter 0.0, position 0.0, shape 0.0" in page


def test_a_stopped_measurement_is_continued_and_another_model_starts_anew(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeAnswerer, "fail_at", "k_ratio=0.15")
    with pytest.raises(KeyboardInterrupt):
        table.main(arguments)
    monkeypatch.setattr(FakeAnswerer, "fail_at", None)
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls[0] == "TrimmedLlama(k_ratio=0.15)"
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls == []
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls[0] == "KeepAll()"


@pytest.mark.parametrize("changed", ["chat_template.jinja", "config.json", "model.safetensors"])
def test_another_file_of_the_model_is_another_identity(tmp_path: Path, changed: str) -> None:
    for name in ("chat_template.jinja", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("one")
    before = table.identity(tmp_path, {"scenes-test": 6})
    (tmp_path / changed).write_text("other")
    assert table.identity(tmp_path, {"scenes-test": 6}) != before


def test_the_code_that_decides_an_answer_is_part_of_the_identity() -> None:
    names = {str(path.relative_to(table.ROOT)) for path in table.code()}
    assert {
        "demo/answerer.py",
        "demo/scenes.py",
        "pipeline/engine.py",
        "pipeline/images.py",
        "pipeline/prompts.py",
        "trimming/engine/prefill.py",
        "trimming/policies/trimmed_llama.py",
        "trimming/selection.py",
    } <= names
    assert not names & {"demo/table.py", "trimming/engine/cuda.py", "trimming/engine/triton_attention.py"}


def committed() -> table.Result:
    return json.loads((RESULTS / "accuracy.json").read_text())


def test_the_committed_results_are_whole_and_their_page_says_the_same() -> None:
    report = committed()
    for name, results in report["results"].items():
        assert list(results) == list(table.labels()), f"{name} was measured in other columns: {ANEW}"
    assert report["measured"]["rows"] == {"easy-vqa-test": EASY_VQA_QUESTIONS["test"], "scenes-test": 3_000}
    assert (RESULTS / "accuracy.md").read_text() == table.markdown(report), f"accuracy.md is not accuracy.json's: {ANEW}"


def test_the_committed_results_belong_to_the_committed_model_and_code() -> None:
    measured = committed()["measured"]
    now = table.identity(MODEL, measured["rows"])
    differ = [name for name in now if measured.get(name) != now[name]]
    assert "model_sha256" not in differ, f"demo/results tells of another model: {ANEW}"
    if differ:
        # Not every change of code changes an answer, so this is no failure.
        pytest.skip(f"demo/results was measured before {', '.join(differ)} changed: {ANEW}")
