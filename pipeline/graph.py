"""The run, composed: source → actors → sink, with its records around it."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

from pipeline import cluster, record
from pipeline.plan import Plan


def run(plan: Plan) -> dict[str, Any]:
    """Does what is left of ``plan`` and returns its summary; a finished run is not touched.

    Raises ``cluster.TooSmallError`` before anything is written; Ray's exceptions where the run broke off; ``ValueError`` where
    all units are written and do not have the plan's rows.
    """
    summary = record.read_summary(plan.output) if plan.begun and not plan.remaining else None
    if summary is not None:
        return summary
    began = time.monotonic()
    stats = record.read_markers(plan.output, plan.finished)
    working = 0.0
    if plan.remaining:
        with cluster.connected(plan.config.ray_address):
            resources = cluster.fit(plan.config)
            record.begin(plan.output, plan.record() | {"started": datetime.now(UTC).isoformat(timespec="seconds")})
            now = time.monotonic()
            stats += _execute(plan, resources)
            working = time.monotonic() - now
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
    record.write_summary(plan.output, summary)
    return summary


def _execute(plan: Plan, resources: cluster.Resources) -> list[dict[str, Any]]:
    """Runs the remaining units on the connected cluster; their statistics."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from pipeline.actor import Answerer
    from pipeline.progress import Progress
    from pipeline.sink import UnitSink, UnitWriter
    from pipeline.source import UnitReader, UnitSource

    config, units = plan.config, plan.remaining
    # Before the source: a dataset captures its context when it is made.
    context = DataContext.get_current()
    context.enable_progress_bars = False
    _quiet_console()

    sink = UnitSink(UnitWriter(plan.output, plan.columns.output(config.write_kept)))
    source = UnitSource(UnitReader(plan.input, plan.columns), units)
    with Progress(plan.rows, plan.rows - sum(u.rows for u in units)) as progress:
        ray.data.read_datasource(source, override_num_blocks=len(units)).map_batches(
            Answerer,
            fn_constructor_args=(config, plan.columns, plan.checkpoint, progress.report),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources.cpus,
            # Two units at once in each actor: one is examined and decoded while the other is on the device.
            compute=ActorPoolStrategy(
                size=config.num_actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            **({"num_gpus": resources.gpus} if resources.gpus else {}),
        ).write_datasink(sink)
    return sink.stats


def _quiet_console() -> None:
    """Ray Data's log stays in the session's files: what goes wrong comes as an exception, and progress is ours."""
    for handler in logging.getLogger("ray.data").handlers:
        # By its name in Ray Data's logging configuration: whoever hangs a handler of their own there still hears all.
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
