from __future__ import annotations

from pipeline.progress import Meter


def test_rate_and_time_left_leave_out_the_start() -> None:
    meter = Meter(total=2_000, done=500, began=100.0)
    assert meter.line(0, 0, 110.0) == "starting: 10 s"
    assert meter.line(32, 0, 120.0) == "532 of 2,000 rows, 0 errors"
    assert meter.line(132, 1, 130.0) == "632 of 2,000 rows, 10.0 rows/s, 2:17 left, 1 error"
    assert meter.line(1_500, 2, 200.0) == "2,000 of 2,000 rows, 18.4 rows/s, 0:00 left, 2 errors"


def test_redone_work_does_not_pass_the_total() -> None:
    meter = Meter(total=100, done=0, began=0.0)
    meter.line(10, 0, 1.0)
    assert meter.line(150, 3, 2.0).startswith("100 of 100 rows")


def test_long_runs_have_hours() -> None:
    meter = Meter(total=100_000, done=0, began=0.0)
    meter.line(1, 0, 0.0)
    assert "10.0 rows/s, 2:46:30 left" in meter.line(101, 0, 10.0)
