"""The demo's side-by-side report, read from run folders made by hand; the job itself has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo import run

ROWS = [
    {"id": "easy-vqa/test/000001", "kind": "color", "answer": "red", "text": "red", "error": None},
    {"id": "easy-vqa/test/000002", "kind": "presence", "answer": "yes", "text": "no", "error": None},
    {"id": "scenes/test/000000/caption", "kind": "caption", "answer": "red star a", "text": "red star a", "error": None},
    {"id": "scenes/test/000001/caption", "kind": "caption", "answer": "red star a", "text": "red star", "error": None},
    {"id": "scenes/test/000002/caption", "kind": "caption", "answer": "red star a", "text": None, "error": "broken image"},
]


def finished_run(folder: Path, keep: float) -> Path:
    folder.mkdir(parents=True)
    kept: list[dict[str, Any]] = [
        {"keep_fraction": None, "cross_kv_bytes_full": None, "cross_kv_bytes": None}
        if row["error"]
        else {"keep_fraction": keep, "cross_kv_bytes_full": 1_000_000, "cross_kv_bytes": int(1_000_000 * keep)}
        for row in ROWS
    ]
    pq.write_table(pa.Table.from_pylist([row | k for row, k in zip(ROWS, kept, strict=True)]), folder / "part.parquet")
    (folder / ".run").mkdir()
    summary = {
        "rows": 5,
        "rows_this_start": 5,
        "images": 4,
        "seconds_working": 0.5,
        "images_encoded": 1_003,
        "image_hits": 1,
        "peak_sequences": 4,
        "seconds_per_stage": {"tower": 0.25, "prefill": 0.11, "read": 0.01},
    }
    (folder / ".run/summary.json").write_text(json.dumps(summary))
    return folder


def line(report: str, name: str, block: int = 0) -> list[str]:
    return [text for text in report.splitlines() if text.strip().startswith(name)][block][26:].split()


def test_report_sets_both_runs_side_by_side(tmp_path: Path) -> None:
    runs = [run.Run(name, finished_run(tmp_path / name, keep)) for name, keep in (("full", 1.0), ("trimmed", 0.5))]
    report = run.report(runs)
    assert line(report, "rows") == ["2", "2"]
    assert line(report, "rows", block=1) == ["3", "3"]
    assert line(report, "errors", block=1) == ["1", "1"]
    assert line(report, "right answers") == ["50.0%", "50.0%"]
    assert line(report, "color") == ["100.0%", "100.0%"]
    # A row in error counts as a wrong answer.
    assert line(report, "caption, exact") == ["33.3%", "33.3%"]
    assert line(report, "features kept, mean") == ["100.0%", "50.0%"]
    assert line(report, "cross-attention KV") == ["2.0", "MB", "1.0", "MB"]
    assert line(report, "saved") == ["0.0%", "50.0%"]
    assert line(report, "images a second") == ["8", "8"]
    assert line(report, "encoded") == ["1,003", "1,003"]
    assert line(report, "shared with another row") == ["1", "1"]
    assert line(report, "rows at once, most") == ["4", "4"]
    assert line(report, "seconds in the tower") == ["0.2", "0.2"]
    assert line(report, "in prefill") == ["0.1", "0.1"]
    # Nothing was decoded: the stage is not there.
    assert line(report, "in decoding") == ["0.0", "0.0"]


def test_speed_of_a_run_in_several_starts_is_not_told(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "full", 1.0)
    summary = json.loads((folder / ".run/summary.json").read_text()) | {"rows_this_start": 2}
    (folder / ".run/summary.json").write_text(json.dumps(summary))
    assert run.images_per_second(run.Run("full", folder)) == "-"


def test_a_failing_job_ends_the_demo_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "shards/scenes-test/part-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True)
    shard.touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    monkeypatch.setattr(run, "answer", lambda *_: 3)
    arguments = ["--shards", tmp_path / "shards", "--output", tmp_path / "out", "--model", tmp_path / "model"]
    assert run.main(list(map(str, arguments))) == 3


@pytest.mark.parametrize("lacking", ["shards", "model"])
def test_what_is_missing_is_named(tmp_path: Path, lacking: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards/scenes-test").mkdir(parents=True)
    if lacking == "model":
        (tmp_path / "shards/scenes-test/part-00000-of-00001.parquet").touch()
    with pytest.raises(SystemExit) as stop:
        run.main(["--shards", str(tmp_path / "shards"), "--output", str(tmp_path), "--model", str(tmp_path / "model")])
    assert stop.value.code == 2
    assert f"--{lacking} {tmp_path / lacking}" in capsys.readouterr().err
