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


SUMMARY: dict[str, Any] = {
    "rows": 5,
    "images": 4,
    "actor_seconds": 0.5,
    "peak_sequences": 1_004,
    "peak_cross_kv_bytes": 2_000_000,
    "cross_kv_byte_seconds": 500_000.0,
    "cross_kv_bytes_read": 8_000_000,
    "seconds_per_stage": {"tower": 0.25, "prefill": 0.11, "decode": 0.09, "read": 0.01},
}
CHEAPER: dict[str, Any] = {
    "actor_seconds": 0.4,
    "peak_cross_kv_bytes": 1_000_000,
    "cross_kv_byte_seconds": 200_000.0,
    "cross_kv_bytes_read": 4_000_000,
    "seconds_per_stage": {"tower": 0.25, "prefill": 0.06, "decode": 0.04},
}


def finished_run(folder: Path, keep: float, **summary: Any) -> run.Run:
    folder.mkdir(parents=True)
    rows = [row | {"keep_fraction": None if row["error"] else keep} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "part.parquet")
    (folder / ".run").mkdir()
    (folder / ".run/summary.json").write_text(json.dumps(SUMMARY | summary))
    return run.Run(folder)


def line(report: str, name: str, block: int = 0) -> list[str]:
    return [text for text in report.splitlines() if text.strip().startswith(name)][block][26:].split()


def test_report_sets_both_runs_side_by_side(tmp_path: Path) -> None:
    report = run.report(finished_run(tmp_path / "full", 1.0), finished_run(tmp_path / "trimmed", 0.5, **CHEAPER))
    assert line(report, "policy") == ["none", "K", "=", "0.25"]
    assert line(report, "rows") == ["2", "2"]
    assert line(report, "rows", block=1) == ["3", "3"]
    assert line(report, "errors", block=1) == ["1", "1"]
    assert line(report, "right answers") == ["50.0%", "50.0%", "+0.0", "points"]
    assert line(report, "color") == ["100.0%", "100.0%", "+0.0", "points"]
    # A row in error counts as a wrong answer.
    assert line(report, "caption, exact") == ["33.3%", "33.3%", "+0.0", "points"]
    assert line(report, "features kept, mean") == ["100.0%", "50.0%"]
    assert line(report, "peak cross KV held") == ["2.0", "MB", "1.0", "MB", "0.50", "×"]
    assert line(report, "byte-seconds held") == ["0.5", "MB·s", "0.2", "MB·s", "0.40", "×"]
    assert line(report, "bytes read in decoding") == ["8.0", "MB", "4.0", "MB", "0.50", "×"]
    assert line(report, "seconds in the tower") == ["0.2", "0.2", "1.00", "×"]
    assert line(report, "in prefill") == ["0.1", "0.1", "0.55", "×"]
    assert line(report, "in decoding") == ["0.1", "0.0", "0.44", "×"]
    assert line(report, "in both of these") == ["0.2", "0.1", "0.50", "×"]
    assert line(report, "images a second") == ["8.0", "10.0", "1.25", "×"]
    assert line(report, "rows at once, most") == ["1,004", "1,004", "1.00", "×"]
    assert "saved" not in report


def test_what_trimmed_is_better_in_and_what_not_follows_from_the_figures(tmp_path: Path) -> None:
    full = finished_run(tmp_path / "full", 1.0)
    better = run.verdict(full, finished_run(tmp_path / "better", 0.5, **CHEAPER))
    held, seconds = "held bytes (peak 0.50 ×, byte-seconds 0.40 ×)", "seconds (prefill and decoding, 0.50 ×)"
    assert better == [f"Trimmed is better in {held}, {seconds}, images a second (1.25 ×)."]

    slow = CHEAPER | {"actor_seconds": 0.6}
    assert run.verdict(full, finished_run(tmp_path / "slow", 0.5, **slow)) == [
        f"Trimmed is better in {held}, {seconds}.",
        "It is not in images a second (0.83 ×): prefill and decoding are 0.2 of 0.5 s, and trimming changes nothing else.",
    ]

    stages = {"tower": 0.25, "prefill": 0.22, "decode": 0.09}
    worse = SUMMARY | {"peak_cross_kv_bytes": 4_000_000, "seconds_per_stage": stages}
    said = run.verdict(full, finished_run(tmp_path / "worse", 0.5, **worse))
    assert said[:3] == [
        "Trimmed is better in nothing.",
        "It is not in held bytes (peak 2.00 ×, byte-seconds 1.00 ×): its rows share less of what they keep.",
        "It is not in seconds (prefill and decoding, 1.55 ×): prefill takes 2.00 ×, decoding 1.00 ×.",
    ]
    more = run.verdict(full, finished_run(tmp_path / "more", 0.5, **worse | {"peak_sequences": 2_000}))
    assert more[1].endswith("it had 2,000 rows at once, not 1,004.")


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
