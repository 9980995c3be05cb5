"""From calls to seconds and back: rooflines, calibration on a GPU and on a CPU."""

from __future__ import annotations

import pytest

from jobs.estimation.machine import ASSUMED, Machine, fit_cpu, roofline, shares_of
from jobs.estimation.schedule import Call
from jobs.report import STAGES, Stage
from trimming.costs import Cost


def call(stage: Stage, *parts: tuple[int, int]) -> Call:
    costs = tuple(Cost(*part) for part in parts)
    return Call(stage, sum(costs, Cost()), costs, 1, 0)


CALLS = [call("tower", (800, 10)), call("prefill", (400, 60)), call("decode", (40, 90)), call("decode", (60, 110))]


def test_a_gpu_takes_the_longer_of_the_two_for_each_part() -> None:
    machine = roofline("it", 100.0, 10.0, {"tower": 1.0, "prefill": 0.5, "decode": 0.5})
    # The first part is bound by operations, the second by bytes: what a sum over both would hide.
    time = machine.time([call("prefill", (400, 10), (50, 20))])
    assert (time.seconds, time.operations, time.bytes) == (8 + 4, 8, 4)
    assert time.bound == "operations"
    assert time.bound_share == pytest.approx(2 / 3)
    assert machine.by_stage(CALLS)["decode"].bound == "bytes"
    assert machine.by_stage(CALLS)["decode"].seconds == pytest.approx((90 + 110) / 5)


def test_a_cpu_adds_them_up() -> None:
    machine = Machine("it", dict.fromkeys(STAGES, 100.0), dict.fromkeys(STAGES, 10.0), adds=True)
    assert machine.time([call("decode", (40, 90))]).seconds == pytest.approx(0.4 + 9)


def test_what_a_gpu_run_reached_is_found_again_and_reproduces_it() -> None:
    reached: dict[Stage, float] = {"tower": 0.4, "prefill": 0.3, "decode": 0.7}
    seconds = {stage: time.seconds for stage, time in roofline("it", 100.0, 10.0, reached).by_stage(CALLS).items()}
    assert shares_of(100.0, 10.0, CALLS, seconds) == pytest.approx(reached)


def test_a_cpus_two_rates_are_found_again_from_one_run() -> None:
    rates: dict[Stage, float] = {"tower": 200.0, "prefill": 300.0, "decode": 300.0}
    true = Machine("it", rates, {"tower": float("inf"), "prefill": 20.0, "decode": 20.0}, adds=True)
    fitted = fit_cpu("it", CALLS, {stage: time.seconds for stage, time in true.by_stage(CALLS).items()})
    assert fitted.operations == pytest.approx(rates)
    assert fitted.bytes == pytest.approx(true.bytes)
    other = [call("decode", (7, 500))]
    assert fitted.time(other).seconds == pytest.approx(true.time(other).seconds)


def test_a_cpu_run_without_a_positive_solution_is_reproduced_all_the_same() -> None:
    # Prefill so slow for its operations that decode would have to be faster than nothing.
    seconds: dict[Stage, float] = {"tower": 1.0, "prefill": 100.0, "decode": 0.1}
    fitted = fit_cpu("it", CALLS, seconds)
    assert {stage: time.seconds for stage, time in fitted.by_stage(CALLS).items()} == pytest.approx(seconds)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_time_calibrates_nothing(stage: Stage) -> None:
    seconds: dict[Stage, float] = dict.fromkeys(STAGES, 1.0)
    for learn in (lambda: fit_cpu("it", CALLS, seconds), lambda: shares_of(1.0, 1.0, CALLS, seconds)):
        seconds[stage] = 0.0
        with pytest.raises(ValueError, match=f"no seconds of {stage}"):
            learn()


def test_assumed_shares_stand_for_every_stage_and_claim_no_peak() -> None:
    assert set(ASSUMED) == set(STAGES)
    assert all(0 < share < 1 for share in ASSUMED.values())
