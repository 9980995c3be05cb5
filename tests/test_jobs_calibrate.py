"""``jobs.calibrate`` as it is typed, on a real local Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import answer, calibrate, compare
from pipeline.storage import Storage

ROWS = 24
K_RATIOS = [1.0, 0.3, 0.05]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> Path:
    """Three questions about each of eight images, in two shards."""
    folder = tmp_path_factory.mktemp("calibrate") / "in"
    folder.mkdir()
    images = [picture(100 + 40 * (i % 4), 80, seed=i) for i in range(ROWS // 3)]
    for part in range(2):
        rows = range(part * ROWS // 2, (part + 1) * ROWS // 2)
        table = {
            "image": [images[i // 3] for i in rows],
            "question": [f"how many {'abc'[i % 3]}" for i in rows],
            "id": [f"{i:03d}" for i in rows],
        }
        pq.write_table(pa.table(table), folder / f"{part}.parquet", row_group_size=5)
    return folder


def given(shards: Path, output: Path | str, checkpoint_folder: str, *more: str) -> list[str]:
    wanted = ["--k-ratios", str(K_RATIOS), "--sample", str(ROWS), "--max-new-tokens", "8"]
    return ["--input", str(shards), "--output", str(output), "--model", checkpoint_folder, *wanted, *more]


def texts(folder: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for row in pq.read_table(folder).to_pylist()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_calibration(
    shards: Path, checkpoint_folder: str, ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every K's answers are those of a run of its own, where an image's rows decide together; images go through the tower once;
    what was held is each run's own; and the result can be used."""
    out = tmp_path / "out"
    arguments = given(shards, out, checkpoint_folder, "--target-agreement", "0.3", "--measure", "edit_similarity")
    assert calibrate.main(arguments) == 0
    said = capsys.readouterr().out
    assert "is the smallest that holds 30.00% agreement (token-level edit similarity)" in said

    found = json.loads((out / "calibration.json").read_text())
    assert [point["k_ratio"] for point in found["points"]] == K_RATIOS
    full = texts(out / "runs/all")
    assert len(full) == ROWS
    own = tmp_path / "own"
    options = ["--input", str(shards), "--model", checkpoint_folder, "--max-new-tokens", "8"]
    assert answer.main([*options, "--output", str(own / "all"), "--policy", "none"]) == 0
    assert answer.main([*options, "--output", str(own / "k"), "--k-ratio", "0.3"]) == 0
    assert full == texts(own / "all")
    assert texts(out / "runs/k-0.3") == texts(own / "k")
    # Equal files of several questions are one image, and other K find it there.
    summaries = [json.loads((out / f"runs/{name}/.run/summary.json").read_text()) for name in ("all", "k-1", "k-0.3", "k-0.05")]
    assert [s["images_encoded"] for s in summaries] == [ROWS // 3, 0, 0, 0]
    assert found["points"][0]["agreement"] == 1.0
    assert found["points"][0]["effective_rows"] == ROWS // 3
    # Rows about one image shared one set: what a K held falls like what it kept, and K = 1 held what all features did.
    took = [found["full"], *(point["spent"] for point in found["points"])]
    assert [one["peak_bytes"] for one in took] == [s["peak_cross_kv_bytes"] for s in summaries]
    assert [one["byte_seconds"] for one in took] == [s["cross_kv_byte_seconds"] / ROWS for s in summaries]
    # How many ran at once, and so the peak, depends on when Ray's units arrive; what each held of an image does not.
    assert min(took[0]["peak_bytes"], took[1]["peak_bytes"]) > took[3]["peak_bytes"] > 0
    assert took[0]["own_bytes"] * ROWS > 2 * took[0]["peak_bytes"]
    assert took[1]["of_full"] == pytest.approx(1, abs=0.1)
    assert took[3]["of_full"] < took[2]["of_full"] < took[1]["of_full"]
    assert "| all |" in said
    assert "of 8 images with all their rows" in said
    assert "WARNING" not in said

    # The configuration is one that the jobs take.
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written == {"model": checkpoint_folder, "max_new_tokens": 8, "policy": "trimmed-llama", "k_ratio": found["chosen"]}
    more = ["--input", str(shards), "--output", str(tmp_path / "new"), "--dry-run"]
    capsys.readouterr()
    assert answer.main(["--config", str(out / "config.yaml"), *more]) == 0
    assert f"k_ratio={found['chosen']:g}" in capsys.readouterr().out
    assert (out / "curve.svg").read_text().startswith("<?xml")

    # The same command again answers nothing anew, and writes what a start that was killed at its very end has not.
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.parquet")}
    unsummed = sorted(out.glob("runs/*/.run/summary.json"))
    for path in unsummed:
        path.unlink()
    assert calibrate.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.parquet")} == before
    assert sorted(out.glob("runs/*/.run/summary.json")) == unsummed
    assert json.loads((out / "calibration.json").read_text()) == found

    # What is lost of it is answered again, and comes out the same.
    lost = sorted((out / "runs/k-0.3/.run/units").iterdir())[:5] + sorted((out / "runs/all/.run/units").iterdir())[3:5]
    for marker in lost:
        marker.unlink()
    again = json.loads((out / "calibration.json").read_text())
    assert calibrate.main(arguments) == 0
    assert all(marker.exists() for marker in lost)
    after = json.loads((out / "calibration.json").read_text())
    assert [p["agreement"] for p in after["points"]] == [p["agreement"] for p in again["points"]]

    # Another target over the same sample costs nothing either, and one that nothing holds leaves no configuration.
    assert calibrate.main([*given(shards, out, checkpoint_folder), "--target-agreement", "0.99"]) == 4
    captured = capsys.readouterr()
    assert "The sample is too small for 99.00% agreement" in captured.err
    assert not (out / "config.yaml").exists()

    assert calibrate.main([*arguments, "--sample", "12"]) == 2
    assert "holds a calibration with {'sample': 24, 'seed': 0}, not {'sample': 12, 'seed': 0}" in capsys.readouterr().err

    # Its runs can be compared like any others, with a word on their speed.
    folders = [str(out / f"runs/{name}") for name in ("all", "k-0.3")]
    assert compare.main([*folders, "--baseline", folders[0], "--out", str(tmp_path / "report"), "--price", "cpu=0.1"]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert any("their speeds are no run's own" in warning for warning in report["comparisons"][0]["warnings"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_tower_policy_is_every_ks_and_all_features_see_the_whole_tower(
    shards: Path, checkpoint_folder: str, ray_cluster: str, tmp_path: Path
) -> None:
    out, own, tower = tmp_path / "out", tmp_path / "own", ["--tower-policy", "alike", "--tower-keep", "0.6"]
    arguments = given(shards, out, checkpoint_folder, "--target-agreement", "0.1", "--measure", "edit_similarity", *tower)
    # Without K = 1, which the tower brings along.
    assert calibrate.main([*arguments, "--k-ratios", "[0.3, 0.05]"]) == 0
    names = ("all", "k-1", "k-0.3", "k-0.05")
    configs = [json.loads((out / f"runs/{name}/.run/run.json").read_text())["config"] for name in names]
    assert [(c["tower_policy"], c["tower_keep"]) for c in configs] == [(None, None)] + [("alike", 0.6)] * 3
    # Images go through each of the two towers once.
    summaries = [json.loads((out / f"runs/{name}/.run/summary.json").read_text()) for name in names]
    assert [s["images_encoded"] for s in summaries] == [ROWS // 3, ROWS // 3, 0, 0]
    assert [s["mean_tower_keep_fraction"] for s in summaries] == [1.0, *[pytest.approx(0.6, abs=0.02)] * 3]
    options = ["--input", str(shards), "--model", checkpoint_folder, "--max-new-tokens", "8", "--output", str(own)]
    assert answer.main([*options, "--k-ratio", "0.3", *tower]) == 0
    assert texts(out / "runs/k-0.3") == texts(own)
    chosen = yaml.safe_load((out / "config.yaml").read_text())
    assert (chosen["tower_policy"], chosen["tower_keep"]) == ("alike", 0.6)
    assert "`alike` leaves 0.6 of its rows × layers for every K" in (out / "calibration.md").read_text()
    refused = given(shards, tmp_path / "refused", checkpoint_folder, "--tower-policy", "alike", "--tower-keep", "0.1")
    assert calibrate.main(refused) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_k_that_is_given_up_gets_no_more_rows(
    shards: Path, checkpoint_folder: str, ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Captions that each decide alone, four rows at a time, from rows drawn one by one."""
    from jobs.calibration import run

    monkeypatch.setattr(run, "ROWS_AT_ONCE", 4)
    out = tmp_path / "out"
    more = ["--target-agreement", "0.85", "--prompt", "what is it", "--kept-sets", "question"]
    assert calibrate.main(given(shards, out, checkpoint_folder, *more)) in (0, 4)
    points = json.loads((out / "calibration.json").read_text())["points"]
    assert points[-1]["given_up"]
    assert 4 <= points[-1]["rows"] < ROWS
    assert points[0]["rows"] == ROWS
    page = (out / "calibration.md").read_text()
    assert f"given up after {points[-1]['rows']}" in page
    assert "one for each question" in page
    assert len(list((out / "runs/all").glob("*.parquet"))) == ROWS
    # And none when it is called again.
    files = len(list((out / "runs/k-0.05").glob("*.parquet")))
    calibrate.main(given(shards, out, checkpoint_folder, *more))
    assert len(list((out / "runs/k-0.05").glob("*.parquet"))) == files


@pytest.mark.ray
@pytest.mark.slow
def test_a_calibration_on_s3(
    shards: Path, checkpoint_folder: str, ray_cluster: str, s3: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = Storage("s3://bucket/calibrate in", s3), Storage("s3://bucket/calibrated", s3)
    for shard in shards.iterdir():
        root.write(shard.name, shard.read_bytes(), temporary="")
    arguments = ["--input", root.url, "--output", output.url, "--storage-options", json.dumps(s3)]
    wanted = ["--model", checkpoint_folder, "--k-ratios", "[1.0]", "--sample", "6", "--max-new-tokens", "4"]
    assert calibrate.main([*arguments, *wanted, "--target-agreement", "0.2"]) == 0
    assert output.names() == [".run", "calibration.json", "calibration.md", "config.yaml", "curve.svg", "runs"]
    captured = capsys.readouterr()
    assert s3["secret"] not in captured.out + captured.err + output.read("config.yaml").decode()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target-agreement", "1"], "target_agreement=1.0 must lie between 0 and 1; no sample proves 1"),
        (["--confidence", "0"], "confidence=0.0 must lie between 0 and 1"),
        (["--sample", "0"], "sample=0 must be at least 1"),
        (["--k-ratios", "[]"], "k_ratios=[] must be shares"),
        (["--k-ratios", "[0.5, 1.5]"], "must be shares above 0 and at most 1"),
        (["--measure", "bleu"], "measure"),
        (["--policy", "grid"], "policy"),
        (["--kept-sets", "both"], "kept_sets"),
        (["--input", "/no/such/place"], "input='/no/such/place' does not exist"),
    ],
)
def test_refusals(
    shards: Path, checkpoint_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert calibrate.main([*given(shards, tmp_path / "out", checkpoint_folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--kept-sets", "question"]])
def test_a_sample_too_small_to_show_anything_is_told_before_it_is_answered(
    shards: Path, checkpoint_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """24 rows about eight images, of the README's own target: even if all agreed."""
    assert calibrate.main([*given(shards, tmp_path / "out", checkpoint_folder), *options]) == calibrate.NOTHING_HOLDS
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 + ("question" not in options)
    assert "The sample is too small for 99.00% agreement" in captured.err
    if "question" in options:
        assert "its 24 rows show no more than 88.27% even if all agree; 299 rows could show it" in captured.err
    else:
        worth = "its 24 rows are worth 8 independent ones, which show no more than 68.77% even if all agree"
        assert f"{worth}; rows worth 299 could show it" in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(
    shards: Path, checkpoint_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert calibrate.main(given(shards, tmp_path, checkpoint_folder)) == 2
    assert "holds files of something else (mine.txt)" in capsys.readouterr().err
