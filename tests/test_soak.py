"""The soak's arithmetic and page; its short form on a whole job is in test_jobs_faults.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.soak_page import markdown
from benchmarks.soak_run import audit, look, moments
from pipeline.storage import Storage


def test_moments_are_spread_over_a_jobs_whole_life_and_the_same_each_time() -> None:
    drawn = moments(random.Random(0), 10, 60, start_seconds=12.0)
    assert drawn == moments(random.Random(0), 10, 60, start_seconds=12.0)
    assert drawn != moments(random.Random(1), 10, 60, start_seconds=12.0)
    stages = [moment.stage for moment in drawn]
    assert [stages.count(stage) for stage in ("starting", "working", "ending")] == [3, 6, 1]
    working = [moment.units for moment in drawn if moment.stage == "working"]
    assert working == sorted(working)
    assert 1 <= working[0] < working[-1] < 59
    assert all(0 <= moment.seconds <= 12 for moment in drawn if moment.stage == "starting")
    assert drawn[-1].stage == "ending"
    assert drawn[-1].units == 60


def test_the_audit_finds_what_is_lost_twice_or_wrong() -> None:
    found = [("a", "x", None), ("b", "x", None), ("b", "x", None), ("d", None, "no image")]
    assert audit(["a", "b", "c", "d"], found) == {"asked": 4, "written": 4, "lost": 1, "doubled": 1, "errors": 1}


def test_a_file_that_is_cut_short_or_lacks_rows_is_torn(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    for unit in ("whole", "unmarked", "short", "cut"):
        pq.write_table(pa.table({"id": ["a", "b"]}), tmp_path / f"{unit}.parquet")
    for unit, rows in {"whole": 2, "short": 3, "cut": 2}.items():
        output.write(f".run/units/{unit}.json", b'{"rows": %d}' % rows, temporary=".run/unfinished")
    assert look(output) == (8, 1)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-5])
    assert look(output) == (6, 2)


def a_run(**fields: Any) -> dict[str, Any]:
    hits = [
        {"what": "driver", "stage": "starting", "after_seconds": 3.21, "rows": 0, "continued_seconds": 14.04},
        {"what": "driver", "stage": "ending", "after_seconds": 40.0, "rows": 3600, "continued_seconds": None},
    ]
    counts = {"asked": 3600, "written": 3600, "lost": 0, "doubled": 0, "errors": 0, "torn": 0, "unlike": 0}
    return {"name": "local disk", "hits": hits, **counts, "seconds": 191.0, "quiet_seconds": 38.4} | fields


def test_the_page_has_every_hit_and_what_was_lost() -> None:
    measured = {
        "runs": [a_run(), a_run(name="S3", lost=2, written=3598)],
        "left_out": ["3 of 10 hits on S3, for want of time"],
        "job": {"rows": 3600, "units": 61, "unit_rows": 64},
        "seed": 0,
        "conditions": {"hardware": "A CPU", "cores": 2, "commit": "abc", "versions": {"ray": "2.60.0", "python": "3.11.2"}},
    }
    page = markdown(measured)
    assert "| local disk | 2 | 3,600 | 3,600 | **0** | **0** | **0** | **0** | 0 | 38 | 191 |" in page
    assert "| S3 | 2 | 3,600 | 3,598 | **2** | **0** | **0** | **0** | 0 | 38 | 191 |" in page
    assert "| 1 | local disk: driver | starting | 3.2 | 0 | 14.0 |" in page
    assert "| 4 | S3: driver | ending | 40.0 | 3,600 | none were left |" in page
    assert "A CPU, 2 cores" in page
    assert "**Left out**: 3 of 10 hits on S3, for want of time." in page
