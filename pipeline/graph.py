"""The run, composed: source → actors → sink, with its records around it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline import cluster, lock, record
from pipeline.plan import Plan, look_again

if TYPE_CHECKING:
    from pipeline.actor import Answerer


def run(plan: Plan, say: Callable[[str], object] = lambda line: None, actor: type[Answerer] | None = None) -> dict[str, Any]:
    """Does what is left of ``plan`` and returns its summary; a finished run is not touched.

    ``say`` takes a line on what is waited for or deleted. ``actor`` runs instead of ``Answerer``, with its arguments and its
    call: ``benchmarks.scale`` measures with one that answers at once. Raises ``cluster.TooSmallError`` and ``UnusableError``
    before anything is written, ``RefusalError`` where another run writes to the folder or nobody can, Ray's exceptions where
    the run broke off, and ``ValueError`` where all units are written and do not have the plan's rows.
    """
    if (summary := _finished(plan)) is not None:
        return summary
    plan = replace(plan, input=plan.input.patient(), output=plan.output.patient())
    began = time.monotonic()
    with lock.locked(plan.output, say, plan.part):
        # Another run may have written while this one planned, or waited for its lock.
        with lock.refusing(plan.output):
            plan = look_again(plan)
            if (summary := _finished(plan)) is not None:
                return summary
            stats, working = record.read_markers(plan.output, plan.finished), 0.0
        if plan.remaining:
            with cluster.connected(plan.config.ray_address, say), cluster.fitted(plan.config, say) as resources:
                if plan.removes:
                    say(f"deleting {len(plan.removes)} files of the run in {plan.output.url}")
                    record.delete(plan.output, plan.removes)
                started = datetime.now(UTC).isoformat(timespec="seconds")
                with lock.refusing(plan.output):
                    record.begin(plan.output, plan.record() | {"started": started}, plan.part)
                now = time.monotonic()
                stats += _execute(plan, resources, actor)
                working = time.monotonic() - now
        return _conclude(plan, stats, began, working)


def _finished(plan: Plan) -> dict[str, Any] | None:
    return record.read_summary(plan.output, plan.part) if plan.begun and not plan.remaining else None


def _conclude(plan: Plan, stats: list[dict[str, Any]], began: float, working: float) -> dict[str, Any]:
    """Adds up and writes the summary."""
    summary = record.summarise(stats)
    plan.check_rows(summary["rows"])
    new = sum(unit.rows for unit in plan.remaining)
    summary |= {
        "units": len(plan.units),
        "rows_this_start": new,
        "seconds": round(time.monotonic() - began, 3),
        "seconds_working": round(working, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    record.write_summary(plan.output, summary, plan.part)
    record.clear_unfinished(plan.output, plan.part)
    return summary


def _execute(plan: Plan, resources: cluster.Resources, actor: type[Answerer] | None) -> list[dict[str, Any]]:
    """Runs the remaining units on the connected cluster; their statistics."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipeline.actor import Answerer
    from pipeline.attempts import Attempts, RemoteAttempts
    from pipeline.progress import Progress
    from pipeline.sink import UnitSink, UnitWriter
    from pipeline.source import UnitReader, UnitSource

    config, units = plan.config, plan.remaining
    # Before the source: a dataset captures its context when it is made.
    context = DataContext.get_current()
    context.enable_progress_bars = False
    _quiet_console()

    sink = UnitSink(UnitWriter(plan.output, plan.columns.output(config.write_kept), plan.part))
    source = UnitSource(UnitReader(plan.input, plan.columns, plan.image_roots), units)
    # Beside the driver: a worker's machine may go, and what units were begun must not go with it.
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    attempts: Any = ray.remote(Attempts).options(num_cpus=0, scheduling_strategy=beside).remote()
    with Progress(plan.rows, plan.rows - sum(u.rows for u in units)) as progress:
        ray.data.read_datasource(source, override_num_blocks=len(units)).map_batches(
            actor or Answerer,
            fn_constructor_args=(config, plan.columns, plan.checkpoint, progress.report, RemoteAttempts(attempts)),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources.cpus,
            # Two units at once in each actor: one is examined and decoded while the other is on the device.
            compute=ActorPoolStrategy(
                size=config.num_actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            **({"num_gpus": resources.gpus} if resources.gpus else {}),
        ).write_datasink(sink, **_writers(config.num_actors, resources))
    return sink.stats


def _writers(actors: int, resources: cluster.Resources) -> dict[str, Any]:
    """How writers run beside the actors: as Ray Data has it, but without a CPU where reads would leave them none."""
    import ray

    spare = ray.cluster_resources().get("CPU", 0.0) - actors * resources.cpus
    if spare >= 2:
        return {}
    # On one spare CPU Ray Data goes on reading, and until the last read what was answered is neither on disk nor out of the
    # driver's memory. Writers hardly compute; one an actor and another keep up.
    return {"ray_remote_args": {"num_cpus": 0}, "concurrency": actors + 1}


def _quiet_console() -> None:
    """Ray Data's log stays in the session's files: what goes wrong comes as an exception, and progress is ours."""
    for handler in logging.getLogger("ray.data").handlers:
        # By its name in Ray Data's logging configuration: whoever hangs a handler of their own there still hears all.
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
