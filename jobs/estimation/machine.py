"""How long calls take on a machine: rates by stage, from a data sheet and assumed shares of it, or fitted to a measured run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.estimation.schedule import Call
from jobs.report import STAGES, Stage

ASSUMED: dict[Stage, float] = {"tower": 0.5, "prefill": 0.5, "decode": 0.6}
"""Shares of the roofline that stand for stages without a measured one. Assumptions: 0.6 is this project's own goal for decode
steps (the GPU benchmark's), 0.5 a usual share of the peak in large bf16 products."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds, and how many of them the stage was held up by operations and by bytes."""

    seconds: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(self.seconds + other.seconds, self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Time:
        return Time(self.seconds * factor, self.operations * factor, self.bytes * factor)

    @property
    def bound(self) -> str:
        """Which of the two takes more of the time."""
        return "operations" if self.operations >= self.bytes else "bytes"

    @property
    def bound_share(self) -> float:
        return max(self.operations, self.bytes) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Effective rates by stage: operations and bytes a second.

    On a GPU the larger of the two counts, as a roofline has it: memory works beside the arithmetic. On a CPU (``adds``) they
    add up: the same cores multiply and fetch, and a step's products and its attention come one after the other.
    """

    title: str
    operations: Mapping[Stage, float]
    bytes: Mapping[Stage, float]
    adds: bool = False

    def time(self, calls: Iterable[Call]) -> Time:
        """Of these calls, one after the other."""
        total = Time()
        for call in calls:
            operations, moved = self.operations[call.stage], self.bytes[call.stage]
            for part in call.parts:
                a, b = part.operations / operations, part.bytes / moved
                total += Time(a + b, a, b) if self.adds else Time(a, a, 0.0) if a >= b else Time(b, 0.0, b)
        return total

    def by_stage(self, calls: Sequence[Call]) -> dict[Stage, Time]:
        return {stage: self.time(call for call in calls if call.stage == stage) for stage in STAGES}


def roofline(title: str, rate: float, bandwidth: float, shares: Mapping[Stage, float]) -> Machine:
    """A GPU of these peaks, of which each stage reaches its share."""
    operations = {stage: rate * shares[stage] for stage in STAGES}
    return Machine(title, operations, {stage: bandwidth * shares[stage] for stage in STAGES})


def shares_of(rate: float, bandwidth: float, calls: Sequence[Call], seconds: Mapping[Stage, float]) -> dict[Stage, float]:
    """The share of a GPU's roofline that each stage of a run reached. Raises ``ValueError`` for a stage without time."""
    floor = roofline("", rate, bandwidth, dict.fromkeys(STAGES, 1.0)).by_stage(calls)
    found = {}
    for stage in STAGES:
        if not seconds[stage] > 0 or not floor[stage].seconds > 0:
            raise ValueError(f"the run has no seconds of {stage} to calibrate with; give a longer one")
        found[stage] = floor[stage].seconds / seconds[stage]
    return found


def fit_cpu(title: str, calls: Sequence[Call], seconds: Mapping[Stage, float]) -> Machine:
    """A CPU's rates from one run's three stages; they reproduce that run's seconds.

    Prefill and decode are one language model on one machine: two unknown rates, two equations. The tower has a rate of its own,
    as its matrices have other shapes. Where the equations have no positive solution, as with a model so small that neither rate
    holds it up, each stage has a rate of its own as well: operations for the prefill, bytes for decoding. Raises ``ValueError``
    for a stage without time.
    """
    work: dict[Stage, tuple[int, int]] = {}
    for stage in STAGES:
        costs = [call.cost for call in calls if call.stage == stage]
        work[stage] = sum(cost.operations for cost in costs), sum(cost.bytes for cost in costs)
        if not seconds[stage] > 0 or not work[stage][0]:
            raise ValueError(f"the run has no seconds of {stage} to calibrate with; give a longer one")
    never = float("inf")
    tower = work["tower"][0] / seconds["tower"]
    (a, b), (c, d) = work["prefill"], work["decode"]
    determinant = a * d - b * c
    if determinant:
        an_operation = (seconds["prefill"] * d - seconds["decode"] * b) / determinant
        a_byte = (seconds["decode"] * a - seconds["prefill"] * c) / determinant
        if an_operation > 0 and a_byte > 0:
            rate, bandwidth = 1 / an_operation, 1 / a_byte
            operations: dict[Stage, float] = {"tower": tower, "prefill": rate, "decode": rate}
            return Machine(title, operations, {"tower": never, "prefill": bandwidth, "decode": bandwidth}, adds=True)
    operations = {"tower": tower, "prefill": a / seconds["prefill"], "decode": never}
    return Machine(title, operations, {"tower": never, "prefill": never, "decode": d / seconds["decode"]}, adds=True)
