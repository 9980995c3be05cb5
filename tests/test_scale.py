"""The scale measurement, in small: its stand-in engines through a whole run, its arithmetic and its page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import scale, scale_run
from benchmarks.scale_page import markdown, spread
from benchmarks.scale_run import POINTS, busy_share, line, marginal, measure, trajectory, write_shards
from benchmarks.usage import Look, Usage, look, memory

ROOT = Path(__file__).resolve().parent.parent

# ---- arithmetic -------------------------------------------------------------------------------------------------------------


def test_a_device_is_busy_where_intervals_cover_the_time() -> None:
    assert busy_share([(0, 60), (60, 100)], settled=60) == 1
    assert busy_share([(0, 70), (90, 100)], settled=60) == 0.5
    # A batch that began before the minute was over counts from there on.
    assert busy_share([(10, 75), (85, 90)], settled=60) == pytest.approx(0.5)
    # What overlaps counts once, what lies within another too.
    assert busy_share([(0, 80), (62, 70), (75, 100)], settled=60) == 1
    assert busy_share([(0, 1), (99, 100)], settled=60) == pytest.approx(1 / 40)


def test_a_device_that_ran_no_longer_than_it_settles_has_no_share() -> None:
    assert busy_share([(0, 30), (31, 60)], settled=60) is None


def test_cpu_time_between_two_looks_is_shared_out_evenly() -> None:
    usage = Usage()
    usage.looks = [Look(10, 0, 100, 1000), Look(20, 2, 110, 1020), Look(30, 2, 140, 1040)]
    assert usage.between(10, 30) == Look(20, 2, 40, 40)
    assert usage.between(15, 25) == Look(10, 1, 20, 20)


def test_usage_sees_this_process() -> None:
    seen: dict[tuple[str, str], int] = {("1", "0"): 700}
    before = look(seen)
    ends = time.process_time() + 0.3
    while time.process_time() < ends:
        sum(range(1000))
    after = look(seen)
    assert after.driver - before.driver >= 0.3
    # The process that has ended, and a clock that ticks every 10 ms.
    assert before.own >= 7
    assert after.own - before.own > 0.25
    assert after.all - before.all > 0.25
    assert memory("VmHWM") >= memory("VmRSS") > 2**20


def a_run(units: int, startup: float, row_seconds: float, ramp: float) -> list[tuple[float, int]]:
    """(seconds, rows) of units of 250 rows, of which the first 16 take ``ramp`` seconds more each."""
    took = [250 * row_seconds + ramp * (i < 16) for i in range(units)]
    return [(startup + sum(took[: i + 1]), 250) for i in range(units)]


def test_a_trajectory_has_the_first_and_the_last_moment_and_few_between() -> None:
    assert trajectory([(1.0, 250), (1.5, 100)]) == [(1.0, 250), (1.5, 350)]
    points = trajectory(a_run(4000, 5.0, 0.0001, 0.0))
    assert len(points) == POINTS
    assert points[0] == (pytest.approx(5.025), 250)
    assert points[-1] == (pytest.approx(105.0), 1_000_000)
    assert points == sorted(points)


def test_a_line_is_not_moved_by_stalls() -> None:
    points = [(3 + 0.5 * rows + (40 if rows == 7 else 0), rows) for rows in range(20)]
    assert line(points) == (pytest.approx(3.0), pytest.approx(0.5))


def test_a_slow_start_counts_as_start_up_and_not_for_a_further_row() -> None:
    small, large = (marginal(trajectory(a_run(units, 5.0, 0.0001, 0.1))) for units in (40, 4000))
    assert small["row_seconds"] == pytest.approx(0.0001)
    assert large["row_seconds"] == pytest.approx(0.0001)
    assert small["startup_seconds"] == pytest.approx(5 + 1.6)
    assert small["row_seconds_first_tenth"] is small["row_seconds_last_tenth"] is None
    assert large["row_seconds_last_tenth"] == pytest.approx(large["row_seconds_first_tenth"])


def test_rows_that_grow_dearer_show_in_the_last_tenth() -> None:
    times = [(5 + 0.03 * i + 0.000005 * i * i, 250) for i in range(4000)]
    found = marginal(trajectory(times))
    assert found["row_seconds_last_tenth"] > 1.8 * found["row_seconds_first_tenth"]


def test_rows_that_were_read_ahead_do_not_make_a_short_run_cheap() -> None:
    times = a_run(40, 5.0, 0.0001, 0.0)
    times[32:] = [(times[31][0] + 0.001 * i, 250) for i in range(8)]
    assert marginal(trajectory(times))["row_seconds"] == pytest.approx(0.0001)


def test_a_run_of_a_few_units_has_no_line() -> None:
    assert set(marginal(trajectory(a_run(20, 5.0, 0.0001, 0.1))).values()) == {None}


# ---- page -------------------------------------------------------------------------------------------------------------------


def a_size(rows: int, speed: float) -> dict[str, Any]:
    return {
        "rows": rows,
        "shards": 1,
        "units": rows // 250,
        "image_bytes": 1800.0,
        "plan_seconds": 0.5,
        "first_row_seconds": 7.25,
        "first_run_first_row_seconds": 9.5,
        "seconds": rows / speed,
        "row_seconds": 1 / speed,
        "row_seconds_first_tenth": 0.9 / speed if rows > 10_000 else None,
        "row_seconds_last_tenth": 1.08 / speed if rows > 10_000 else None,
        "startup_seconds": 6.5,
        "trajectory": [[7.25, 250]],
        "rows_per_second": speed,
        "seconds_per_unit": 250 / speed,
        "cpu_seconds_per_unit": 0.04,
        "driver_cpu_seconds_per_unit": 0.01,
        "others_share": 0.05,
        "driver_start_bytes": 200 * 2**20,
        "driver_peak_bytes": 712 * 2**20,
        "block_bytes_read_per_image": 1850.0,
        "block_bytes_answered_per_image": 250.0,
        "start_seconds": 3.0,
    }


def a_result() -> dict[str, Any]:
    paced = {"batch_rows": 8, "batch_seconds": 0.05, "batches": 3250, "settled_seconds": 60.0, "busy": 0.987}
    return {
        "sizes": [a_size(10_000, 5000.0), a_size(100_000, 4000.0)],
        "left_out": [1_000_000],
        "paced": a_size(26_000, 160.0) | paced,
        "conditions": {
            "hardware": "A CPU",
            "cores": 2,
            "commit": "abc",
            "versions": {"ray": "2.60.0", "pyarrow": "26.0.0", "python": "3.11.2"},
        },
    }


def test_the_page_has_goals_sizes_and_conditions() -> None:
    page = markdown(a_result())
    assert "| cost of a further row, last tenth of 100,000 rows over the first tenth | ≤ +20% | **+20%** |" in page
    assert "| µs a further row | 200.0 | 250.0 |" in page
    assert "|   in the first tenth |  | 225.0 |" in page
    # 25 and 2 seconds, 90,000 rows apart.
    assert "|   from the size before |  | 255.6 |" in page
    assert "| start-up by the same line, s | 6.5 | 6.5 |" in page
    assert "| driver's memory, start-up apart | < 1.5 GiB | **0.50 GiB** |" in page
    assert "| engine of 50 ms a batch of 8, busy after the first minute | ≥ 95% | **98.7%** |" in page
    assert "| whole run, start-up and all: rows/s, first file to last | 5,000 | 4,000 |" in page
    assert "| bytes through the object store an image | 2,100 | 2,100 |" in page
    assert "A CPU, 2 cores" in page
    assert "commit abc" in page
    assert "**Left out**, for want of time: 1,000,000 rows." in page


def test_a_row_costs_what_it_does_from_size_to_size() -> None:
    """255.6 µs in the first step, and 225 seconds for 900,000 rows, 250 µs each, in the second."""
    sizes = [a_size(10_000, 5000.0), a_size(100_000, 4000.0), a_size(1_000_000, 4000.0)]
    page = markdown(a_result() | {"sizes": sizes})
    asked = "cost of a row from size to size (10,000, 100,000, 1,000,000), dearest step over cheapest"
    assert f"| {asked} | ≤ +20% | **+2%** |" in page


def test_the_page_of_a_run_that_had_time_for_little() -> None:
    assert spread([0.1]) == 0
    assert spread([0.1, 0.11, 0.105]) == pytest.approx(0.1)
    page = markdown(a_result() | {"sizes": [a_size(10_000, 5000.0)], "paced": None, "left_out": []})
    assert "dearest" not in page
    assert "dearest" not in markdown(a_result())
    assert "busy" not in page
    assert "Left out" not in page
    assert "< 1.5 GiB" in markdown(a_result() | {"paced": a_result()["paced"] | {"busy": None}})


# ---- the program ------------------------------------------------------------------------------------------------------------


def test_help_needs_nothing_heavy() -> None:
    heavy = "import benchmarks.scale, sys; print({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_shards_hold_different_small_images_and_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.pictures import decode

    monkeypatch.setattr(scale_run, "SHARD_ROWS", 400)
    write_shards(tmp_path / "shards", 1000)
    assert len(list((tmp_path / "shards").iterdir())) == 3
    table = pq.read_table(tmp_path / "shards")
    assert len(set(table["id"].to_pylist())) == 1000
    images = set(table["image"].to_pylist())
    assert len(images) == scale_run.PICTURES
    assert {decode(image).size for image in images} == {(64, 64)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_thousand_rows_come_out_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_run, "SHARD_ROWS", 1300)
    write_shards(tmp_path / "shards", 2000)
    # It checks the ids itself.
    found = measure(tmp_path / "shards", tmp_path / "out", "StandIn")
    assert (found["rows"], found["shards"], found["units"]) == (2000, 2, 9)
    assert min(found["first_row_seconds"], found["first_run_first_row_seconds"]) > 0
    assert found["rows_per_second"] > 0
    assert [rows for _, rows in found["trajectory"]][-1] == 2000
    assert found["trajectory"][0][0] == found["first_row_seconds"]
    assert found["row_seconds"] is None
    assert found["cpu_seconds_per_unit"] > found["driver_cpu_seconds_per_unit"] > 0
    assert found["driver_peak_bytes"] >= found["driver_start_bytes"] > 2**20
    assert found["block_bytes_read_per_image"] > 1000 > found["block_bytes_answered_per_image"] > 50
    assert "busy" not in found
    table = pq.read_table(tmp_path / "out")
    assert set(table["error"].to_pylist()) == {None}
    assert len(set(table["image_digest"].to_pylist())) == scale_run.PICTURES


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_paced_engine_is_busy_once_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_run, "SETTLED", 1.0)
    write_shards(tmp_path / "shards", 1000)
    found = measure(tmp_path / "shards", tmp_path / "out", "Paced")
    # Four units of 250 rows, reported 32 at a time.
    assert found["batches"] == 4 * 32
    assert 0.8 < found["busy"] <= 1


@pytest.mark.ray
@pytest.mark.slow
def test_the_program_measures_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "PACED_ROWS", 500)
    monkeypatch.setattr("benchmarks.scale_page.REPEATS", 1)
    assert scale.main(["--output", str(tmp_path / "results"), "--rows", "1000000", "1000", "--minutes", "7"]) == 0
    result = json.loads((tmp_path / "results/scale.json").read_text())
    assert [size["rows"] for size in result["sizes"]] == [1000]
    assert result["left_out"] == [1_000_000]
    assert (tmp_path / "results/scale.md").read_text() in capsys.readouterr().out
