"""From a job, an engine and a machine to seconds by stage, GPU hours and dollars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jobs.estimation.job import Job
from jobs.estimation.machine import Machine, Time
from jobs.estimation.schedule import Call, Engine, slot_tokens
from jobs.report import STAGES, Stage
from trimming.costs import Costs

SPANS = 3
"""The steady state is taken over so many times the rows that run at once, after as many for the slots to fill and mix."""
LEAST_ROWS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a job comes to with one kept fraction. ``actors`` are copies of the model."""

    keep: float
    largest: int
    """Rows that decode at once: what fits, up to the batch size."""
    fits: int
    """Rows that the memory for keys and values holds, whatever the batch size."""
    mean_batch: float
    stages: dict[Stage, Time]
    """Of one actor, for 1,000 images."""
    kv_per_row: float
    """Bytes of a row's slot and of its part of a kept set, at the mean of tiles."""
    peak_cross_kv_bytes: int
    """Of one actor: the most that images' keys and values take at once, what rows share counted once;"""
    cross_kv_byte_seconds: float
    """what they take times the seconds of the stages, for 1,000 images;"""
    cross_kv_bytes_read: float
    """and what decode steps read of them, for 1,000 images."""
    hours: float
    """Of all GPUs together, or on a CPU of all actors."""
    days: float
    """On all GPUs at once."""
    images_per_second: float
    """Per GPU, or on a CPU per actor."""
    dollars: float | None

    @property
    def seconds(self) -> float:
        """Of one actor, for 1,000 images."""
        return sum(time.seconds for time in self.stages.values())


def predict(
    job: Job,
    costs: Costs,
    machine: Machine,
    *,
    keep: float,
    kv_bytes: float,
    gpus: int,
    gpus_per_actor: int = 1,
    price: float | None = None,
) -> Prediction:
    """``keep`` is the share of what the job's tower leaves. ``gpus`` are shared out between actors of ``gpus_per_actor`` each,
    of which one works at a time."""
    engine = Engine(
        costs=costs,
        kv_bytes=kv_bytes,
        max_sequences=job.batch_size,
        kept_sets=job.kept_sets,
        tower_tiles=job.tower_tiles,
        tower_policy=job.tower_policy,
        encode_once=job.image_cache,
        merged=job.merged and keep < 1,
    )
    calls = steady(job, engine, keep)
    times = _per_thousand(job, calls)
    stages = {stage: machine.time(call for call in calls if call.stage == stage) * times[stage] for stage in STAGES}
    seconds = sum(time.seconds for time in stages.values()) / 1000
    steps = [call.rows for call in calls if call.stage == "decode"]
    hours = job.images * seconds * gpus_per_actor / 3600
    kept = sum(share * engine.left(tiles) for tiles, share in job.tiles.items()) * keep / job.sharing(keep)
    held = costs.kv_bytes(slot_tokens(max(1, round(job.prompt)) + job.longest), round(kept))
    return Prediction(
        keep=keep,
        largest=max(steps, default=1),
        fits=int(kv_bytes // held),
        mean_batch=sum(steps) / len(steps) if steps else 1.0,
        stages=stages,
        kv_per_row=held,
        peak_cross_kv_bytes=max(call.held for call in calls),
        cross_kv_byte_seconds=sum(call.held * machine.time([call]).seconds * times[call.stage] for call in calls),
        cross_kv_bytes_read=sum(call.held for call in calls if call.stage == "decode") * times["decode"],
        hours=hours,
        days=hours / gpus / 24,
        images_per_second=1 / seconds / gpus_per_actor,
        dollars=None if price is None else hours * price,
    )


def steady(job: Job, engine: Engine, keep: float) -> list[Call]:
    """The calls of a job in its middle, when slots are full and rows are at all stages of their lives."""
    few = job.rows(LEAST_ROWS, keep, engine.left)
    running = max(1, max(engine.largest(row, job.sharing(keep)) for row in few))
    count = max(LEAST_ROWS, 2 * SPANS * running)
    rows = job.rows(min(count, round(job.images * job.questions) or 1), keep, engine.left)
    calls = list(engine.calls(rows))
    if len(rows) < count:
        # A job so small has no middle.
        return calls
    return _middle(calls, len(rows))


def _middle(calls: list[Call], rows: int) -> list[Call]:
    """From when half of the rows have begun to when the last has."""
    begun, first, last = 0, 0, len(calls)
    for place, call in enumerate(calls):
        if call.stage == "prefill":
            begun += call.rows
            if begun <= rows // 2:
                first = place + 1
            if begun == rows:
                last = place
    return calls[first:last]


def _per_thousand(job: Job, calls: Iterable[Call]) -> dict[Stage, float]:
    """By stage, how often 1,000 images take what ``calls`` do: the tower by images, prefill by rows, decode by tokens. So a
    piece of a run that has begun more rows than it has ended makes no odds."""
    rows = 1000 * job.questions
    wanted: dict[Stage, float] = {
        "tower": 1000.0 if job.image_cache or job.kept_sets == "image" else rows,
        "prefill": rows,
        # Each answer's first token is the prefill's.
        "decode": rows * (job.output - 1),
    }
    done = dict.fromkeys(STAGES, 0)
    for call in calls:
        done[call.stage] += call.rows
    return {stage: wanted[stage] / done[stage] if done[stage] else 0.0 for stage in STAGES}
