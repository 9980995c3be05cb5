"""A calibration, carried out: the sample's runs, and what they prove about each K."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from jobs.calibration.bound import effective_size, lower_bound
from jobs.calibration.sample import Range, pick, pick_images, units_of
from jobs.report import held_of_full
from pipeline import cluster, lock, record, schema
from pipeline.config import RunConfig
from pipeline.listing import list_input
from pipeline.plan import Plan, check_tower, look_again, make_plan
from pipeline.storage import Storage
from pipeline.units import Shard, Unit

RUNS = "runs"
ALL = "all"
SHARED = "images were encoded once for all of a calibration's runs: their speeds are no run's own"
ROWS_AT_ONCE = 64
"""Rows that an actor is given at a time, but for an image that has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked of a K."""

    agreement: float
    measure: str
    """One of ``jobs.comparison.pairs.AGREEMENT``."""
    confidence: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run of the sample took of the machine. Bytes are of images' keys and values, what rows share counted once."""

    peak_bytes: int
    """The most that an actor held at once; it had up to ``ROWS_AT_ONCE`` rows to run."""
    byte_seconds: float | None
    """A row: bytes held, times the seconds of tower, prefill and decoding."""
    of_full: float | None
    """Of these, the multiple of what all features of the same rows would have held in that time, by formula."""
    tower_seconds: float
    """Only the first run through each tower encodes images."""
    generation_seconds: float
    """Prefill and decoding of the sample."""
    own_bytes: float
    """A row's own cache, as if no other row shared it."""

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Spent:
        """Of a run's statistics, as ``pipeline.record.summarise`` has them."""
        stages, held, answered = stats["seconds_per_stage"], stats["cross_kv_byte_seconds"], stats["rows"] - stats["errors"]
        return cls(
            peak_bytes=stats["peak_cross_kv_bytes"],
            byte_seconds=None if held is None else held / max(1, answered),
            of_full=held_of_full(stats),
            tower_seconds=stages.get("tower", 0.0),
            generation_seconds=stages.get("prefill", 0.0) + stages.get("decode", 0.0),
            own_bytes=stats["cross_kv_bytes"] / max(1, answered),
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One K on the curve."""

    k_ratio: float
    rows: int
    """Answered here and with all features."""
    images: int
    effective_rows: float
    """Independent rows that they are worth; see ``bound.effective_size``."""
    agreement: float | None
    at_least: float | None
    """What the agreement exceeds with the target's confidence."""
    keep_fraction: float | None
    spent: Spent
    holds: bool
    given_up: bool
    """Not all of the sample was tried, as this K could no longer hold."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came out. ``points`` come in descending order of K."""

    target: Target
    points: tuple[Point, ...]
    rows: int
    errors: int
    """Rows with an error where all features were kept."""
    full: Spent
    """With all features kept."""
    tower: str | None
    """Policy and share of every K's tower, as in ``alike 0.5``; None where all rows go through it, as with all features."""
    chosen: float | None

    @property
    def effective_rows(self) -> float:
        """Independent rows that the sample is worth, at best."""
        return max((point.effective_rows for point in self.points), default=0.0)

    @property
    def times_one_run(self) -> float | None:
        """The device's seconds, beside those of the run with all features alone."""
        alone, *others = (
            spent.tower_seconds + spent.generation_seconds for spent in (self.full, *(point.spent for point in self.points))
        )
        return (alone + sum(others)) / alone if alone else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def name_of(k_ratio: float) -> str:
    return f"k-{k_ratio:g}"


def plans(
    config: RunConfig,
    k_ratios: Sequence[float],
    rows: int,
    drawn: Sequence[Range] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Plan]:
    """The sample's run with all features, under ``ALL``, then one for each K, all over the same units. A tower policy is every
    K's, and not the first run's, which all of them are held against.

    ``config`` keeps all features, and its output is the calibration's folder; ``drawn`` is the sample of ``rows`` rows where an
    earlier start has drawn it. Raises what ``make_plan`` raises.
    """

    def cut(shards: Sequence[Shard]) -> list[Unit]:
        return units_of(shards, _draw(config, shards, rows, say) if drawn is None else drawn)

    root = config.output.rstrip("/")
    whole = replace(config, tower_policy=None, tower_keep=None)
    first = make_plan(replace(whole, output=f"{root}/{RUNS}/{ALL}"), cut=cut, say=say)
    check_tower(config, first.checkpoint)
    found = {ALL: first}
    for k_ratio in k_ratios:
        folder = f"{root}/{RUNS}/{name_of(k_ratio)}"
        own = replace(config, policy="trimmed-llama", k_ratio=k_ratio, output=folder)
        found[name_of(k_ratio)] = look_again(replace(first, config=own, output=Storage(folder, config.storage_options)))
    return found


def _draw(config: RunConfig, shards: Sequence[Shard], rows: int, say: Callable[[str], object]) -> list[Range]:
    if config.kept_sets == "question":
        return pick(shards, rows, config.seed)
    # Rows about an image decide together what is kept, so that a sample of single rows would try what no job does.
    say(f"looking for images and all their rows, about {rows:,} in all: their row groups are read")
    found = pick_images(list_input(config.input, config.storage_options).root, config.image_column, shards, rows, config.seed)
    if not found and any(shard.rows for shard in shards):
        raise ValueError(f"sample={rows} drew no image, as images have several rows each; draw more")
    return found


class Hope:
    """Which runs can still hold the target: no more rows are spent on one that could not, even if all that is left agreed.

    Giving up early never passes a K that the whole sample would fail, nor fails one that it would pass.

    Args:
        target: what is asked.
        rows: of the sample.
        units: of the sample: its rows are worth no more independent ones.
    """

    def __init__(self, target: Target, rows: int, units: int) -> None:
        from jobs.comparison.pairs import AGREEMENT

        self.target, self.rows, self.units, self.measure = target, rows, units, AGREEMENT[target.measure]
        self.disagreement: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, texts: Mapping[str, str | None], full: Mapping[str, str | None]) -> None:
        """Takes a run's texts by id, and those of all features."""
        for id, text in texts.items():
            other = full.get(id)
            if text is not None and other is not None:
                self.disagreement[name] += 1 - float(self.measure(text, other))

    def lost(self, name: str) -> bool:
        if name == ALL:
            return False
        best = max(0.0, 1 - self.disagreement[name] / self.rows)
        return lower_bound(best, self.units, self.target.confidence) < self.target.agreement


def execute(found: dict[str, Plan], target: Target, say: Callable[[str], object], begin: Callable[[], object]) -> None:
    """Answers what is left of all the plans, but for those whose K can't hold ``target``.

    ``begin`` writes what the caller has to write before any answer, once there is a cluster to answer.
    """
    hope = Hope(target, found[ALL].rows, len(found[ALL].units))
    with lock.refusing(found[ALL].output):
        full = _resume(found, hope)
    patient = {name: replace(plan, output=plan.output.patient()) for name, plan in found.items()}
    goes_on = any(plan.remaining for name, plan in patient.items() if not hope.lost(name))
    # A start that was killed at its very end has left no summary.
    if not goes_on and not any(_unsummed(plan) for plan in patient.values()):
        return
    with lock.locked(patient[ALL].output, say):
        if goes_on:
            _go_on(patient, hope, full, say, begin)
        for plan in map(look_again, patient.values()):
            if _unsummed(plan):
                record.write_summary(plan.output, record.summarise(record.read_markers(plan.output, plan.finished)))
            record.clear_unfinished(plan.output)


def _unsummed(plan: Plan) -> bool:
    return plan.begun and not plan.remaining and record.read_summary(plan.output) is None


def _go_on(
    found: dict[str, Plan],
    hope: Hope,
    full: dict[str, str | None],
    say: Callable[[str], object],
    begin: Callable[[], object],
) -> None:
    first = found[ALL]
    with cluster.connected(first.config.ray_address, say), cluster.fitted(first.config, say) as resources:
        with lock.refusing(first.output):
            begin()
            for plan in found.values():
                now = datetime.now(UTC).isoformat(timespec="seconds")
                record.begin(plan.output, plan.record() | {"started": now, "shared": SHARED})
        _answer(found, resources, hope, full)


def _resume(found: dict[str, Plan], hope: Hope) -> dict[str, str | None]:
    """Tells ``hope`` what an earlier start has found; the texts of all features so far, by id."""
    from jobs.comparison.runs import read_run

    texts: dict[str, dict[str, str | None]] = {ALL: {}}
    for name, plan in found.items():
        if plan.finished:
            tables = read_run(plan.output, name).rows([schema.ID, schema.TEXT])
            texts[name] = {row[schema.ID]: row[schema.TEXT] for table in tables for row in table.to_pylist()}
        if name != ALL:
            hope.add(name, texts.get(name, {}), texts[ALL])
    return texts[ALL]


def _answer(found: dict[str, Plan], resources: cluster.Resources, hope: Hope, full: dict[str, str | None]) -> None:
    import ray
    from ray.util import ActorPool

    from jobs.calibration.actor import Asked, Calibrator
    from pipeline.progress import Progress
    from pipeline.sink import UnitWriter
    from pipeline.source import UnitReader

    first = found[ALL]
    config, units = first.config, first.units
    columns = first.columns.output(config.write_kept)
    runs = [
        Asked(name, plan.config, UnitWriter(plan.output, columns), frozenset(plan.finished)) for name, plan in found.items()
    ]
    reader = UnitReader(first.input.patient(), first.columns, first.image_roots)
    rows = {unit.name: unit.rows for unit in units}
    done = sum(rows[name] for plan in found.values() for name in plan.finished)
    parts = _parts(units)
    with Progress(first.rows * len(found), done) as progress:
        remote = ray.remote(Calibrator).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=2, max_task_retries=2
        )
        actors = [
            remote.remote(config, first.columns, first.checkpoint, progress.report)
            for _ in range(min(config.num_actors, len(parts)))
        ]

        def ask(actor: Any, part: list[Unit]) -> Any:
            # Called when an actor is free: by then some K may be lost.
            return actor.answer.remote(reader, part, [run for run in runs if not hope.lost(run.name)])

        for texts in ActorPool(actors).map_unordered(ask, parts):
            full |= texts[ALL]
            for name in texts.keys() - {ALL}:
                hope.add(name, texts[name], full)


def _parts(units: Sequence[Unit]) -> list[list[Unit]]:
    """What an actor is given at a time: units of ``ROWS_AT_ONCE`` rows together, or one that has more."""
    parts: list[list[Unit]] = []
    rows = 0
    for unit in units:
        if not parts or rows + unit.rows > ROWS_AT_ONCE:
            parts.append([])
            rows = 0
        parts[-1].append(unit)
        rows += unit.rows
    return parts


def read(found: dict[str, Plan], k_ratios: Sequence[float], target: Target) -> Calibration:
    """What the finished runs prove."""
    from jobs.comparison.pairs import Pairs
    from jobs.comparison.runs import read_run

    runs = {name: read_run(plan.output, name) for name, plan in found.items()}
    points = []
    holds = True
    for k_ratio in sorted(k_ratios, reverse=True):
        run = runs[name_of(k_ratio)]
        pairs = Pairs(run, runs[ALL], (None, None), examples=0, agreements=[target.measure])
        clusters = pairs.clusters(target.measure)
        effective, at_least = effective_size(clusters.counts), None
        if clusters.value is not None:
            at_least = lower_bound(clusters.value, effective, target.confidence)
        # From the largest K down to the first that fails: each K is only asked where those above it have passed, so that the
        # chance of a wrong choice among all of them is no larger than that of one.
        holds = holds and at_least is not None and at_least >= target.agreement
        points.append(
            Point(
                k_ratio=k_ratio,
                rows=pairs.compared,
                images=len(clusters.counts),
                effective_rows=effective,
                agreement=clusters.value,
                at_least=at_least,
                keep_fraction=run.stats["mean_keep_fraction"],
                spent=Spent.of(run.stats),
                holds=holds,
                given_up=not run.complete,
            )
        )
    full = runs[ALL].stats
    return Calibration(
        target=target,
        points=tuple(points),
        rows=int(full["rows"]),
        errors=int(full["errors"]),
        full=Spent.of(full),
        tower=runs[name_of(k_ratios[0])].tower,
        chosen=min((point.k_ratio for point in points if point.holds), default=None),
    )
