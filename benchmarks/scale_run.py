"""One run of the pipeline around a stand-in engine, in a process of its own, so that its memory is the driver's and no more:
``python -m benchmarks.scale_run --shards FOLDER --output FOLDER --actor StandIn --result FILE``. Linux only."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from demo import MODEL

if TYPE_CHECKING:
    from pipeline.config import RunConfig

PICTURES = 400
"""Different images; a run's rows take them in turns."""
SIDE = 64
SHARD_ROWS = 10_000
GROUP_ROWS = 250
"""Rows of a row group, under a unit's 256: a unit is one row group."""
FIRST_ROWS = 1000
"""Of a run that goes before, for which Ray starts its workers."""
SETTLED = 60.0
"""Seconds after the first batch from which on a device has to be busy."""

POINTS = 200
"""Of a run's trajectory, at most."""
WARM_ROWS = 4000
"""Rows after which a row costs what a further one does: while they are written, Ray starts its readers and writers."""
LAST_ROWS = 2000
"""Rows at the end that do not count either: they were read ahead, and only have to be answered and written."""
TENTH_ROWS = 10_000
"""Rows in a tenth of a run from which on its beginning and its end are compared: in a shorter one, little else is left."""
FEW_POINTS = 8
"""Fewer points tell nothing about a row's cost."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("shards", "output", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--actor", choices=("StandIn", "Paced"), required=True)
    options = parser.parse_args(arguments)

    began = time.monotonic()
    import ray.data  # noqa: F401 - a part of the start

    from pipeline import cluster

    with cluster.connected(None):
        started = time.monotonic() - began
        measured = measure(options.shards, options.output, options.actor)
    options.result.write_text(json.dumps(measured | {"start_seconds": started}))
    return 0


def write_shards(folder: Path, rows: int) -> None:
    """``rows`` rows with ids, questions and JPEG images, in shards of ``SHARD_ROWS``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    files = pa.array([picture(seed) for seed in range(PICTURES)], pa.binary())
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        numbers = range(start, min(rows, start + SHARD_ROWS))
        table = pa.table(
            {
                "id": [f"{i:09d}" for i in numbers],
                "question": [f"How many shapes are there in picture {i % PICTURES}?" for i in numbers],
                "image": files.take(pa.array([i % PICTURES for i in numbers])),
            }
        )
        # A dictionary would keep each picture once a row group, which no data set of different images does.
        pq.write_table(table, folder / f"{shard:05d}.parquet", row_group_size=GROUP_ROWS, use_dictionary=False)


def picture(seed: int) -> bytes:
    """A JPEG file of ``SIDE`` × ``SIDE`` pixels."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def measure(shards: Path, output: Path, actor: str) -> dict[str, Any]:
    """Runs the shards through the connected Ray and one ``actor``, a class of ``benchmarks.stand_in``, after a small first run.

    Raises ``RuntimeError`` where an id does not come out exactly once.
    """
    from ray.data import DataContext

    from benchmarks import stand_in
    from benchmarks.usage import Usage, memory
    from pipeline import graph
    from pipeline.config import RunConfig
    from pipeline.plan import make_plan

    # Else units are read while the actor starts, and a short run's rows seem to cost nothing to read.
    DataContext.get_current().wait_for_min_actors_s = 60

    # Of the model its configuration alone is looked at.
    config = RunConfig(job="answer", input=str(shards), output=str(output), model=str(MODEL), policy="none")
    first_run = _first_run(replace(config, output=str(output.with_name("first")), limit=FIRST_ROWS))
    start_bytes, began = memory("VmRSS"), time.time()
    plan = make_plan(config)
    planned = time.time()
    with Usage() as usage:
        graph.run(plan, actor=getattr(stand_in, actor))
    peak_bytes = memory("VmHWM")
    _check_ids(output, plan.rows)

    found = [(output / f"{unit.name}.parquet", output / f".run/units/{unit.name}.json") for unit in plan.units]
    ends = [(data.stat().st_mtime, json.loads(marker.read_text())) for data, marker in found]
    ends.sort(key=itemgetter(0))
    stats = [unit for _, unit in ends]
    first, last = ends[0][0], ends[-1][0]
    spent = usage.between(first, last)
    points = trajectory([(moment - planned, unit["rows"]) for moment, unit in ends])
    busy = sorted((start, end) for unit in stats for start, end in unit.get("busy", []))
    return {
        "rows": plan.rows,
        "shards": len(plan.shards),
        "units": len(plan.units),
        "image_bytes": sum(len(picture(seed)) for seed in range(PICTURES)) / PICTURES,
        "plan_seconds": planned - began,
        "first_row_seconds": first - planned,
        "first_run_first_row_seconds": first_run,
        **marginal(points),
        "trajectory": points,
        "seconds": last - first,
        "rows_per_second": (plan.rows - stats[0]["rows"]) / (last - first),
        "seconds_per_unit": (last - first) / (len(ends) - 1),
        "cpu_seconds_per_unit": spent.own / (len(ends) - 1),
        "driver_cpu_seconds_per_unit": spent.driver / (len(ends) - 1),
        "others_share": max(0.0, spent.all - spent.own) / spent.time / (os.cpu_count() or 1),
        "driver_start_bytes": start_bytes,
        "driver_peak_bytes": peak_bytes,
        "block_bytes_read_per_image": sum(unit["block_bytes_in"] for unit in stats) / plan.rows,
        "block_bytes_answered_per_image": sum(unit["block_bytes_out"] for unit in stats) / plan.rows,
        **(_paced(busy) if busy else {}),
    }


def trajectory(units: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(seconds, rows that were written by then) from (seconds, rows) of each unit, in order.

    ``POINTS`` of them at most, with the first and the last.
    """
    rows = list(accumulate(count for _, count in units))
    last = len(units) - 1
    kept = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})
    return [(units[i][0], rows[i]) for i in kept]


def marginal(points: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """What a further row costs, start-up apart: the line through a trajectory without its first and its last rows.

    ``row_seconds`` is its slope and ``startup_seconds`` where it begins; ``row_seconds_first_tenth`` and ``_last_tenth`` are
    the slopes of these parts of the points. Each is None where it has too few of them.
    """
    settled = [point for point in points if WARM_ROWS <= point[1] <= points[-1][1] - LAST_ROWS]
    tenth = len(settled) // 10
    parts = {"": settled, "_first_tenth": settled[:tenth], "_last_tenth": settled[len(settled) - tenth :]}
    if not settled or settled[-1][1] - settled[0][1] < 10 * TENTH_ROWS:
        parts |= {"_first_tenth": [], "_last_tenth": []}
    lines = {name: line(part) if len(part) >= FEW_POINTS else None for name, part in parts.items()}
    slopes = {f"row_seconds{name}": found and found[1] for name, found in lines.items()}
    return {"startup_seconds": lines[""] and lines[""][0], **slopes}


def line(points: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Seconds at no rows, and seconds a row, by Theil and Sen: the median of all pairs' slopes. Single stalls don't move it."""
    slopes = [(later - time) / (more - rows) for (time, rows), (later, more) in combinations(points, 2)]
    slope = median(slopes)
    return median(time - slope * rows for time, rows in points), slope


def _first_run(config: RunConfig) -> float:
    """Seconds to the first file of a run that finds none of Ray's workers up, planning apart."""
    from benchmarks.stand_in import StandIn
    from pipeline import graph
    from pipeline.plan import make_plan

    plan = make_plan(config)
    began = time.time()
    graph.run(plan, actor=StandIn)
    return min(file.stat().st_mtime for file in Path(config.output).glob("*.parquet")) - began


def _paced(busy: Sequence[tuple[float, float]]) -> dict[str, Any]:
    from benchmarks.stand_in import BATCH, BATCH_SECONDS

    return {
        "batch_rows": BATCH,
        "batch_seconds": BATCH_SECONDS,
        "batches": len(busy),
        "settled_seconds": SETTLED,
        "busy": busy_share(busy, SETTLED),
    }


def busy_share(busy: Sequence[tuple[float, float]], settled: float) -> float | None:
    """Share of the time, from ``settled`` seconds after the first start to the last end, that lies in one of the intervals.

    None where there is no such time. Intervals are (start, end), sorted, and may overlap.
    """
    begins, ends = busy[0][0] + settled, max(end for _, end in busy)
    if ends <= begins:
        return None
    covered, reached = 0.0, begins
    for start, end in busy:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (ends - begins)


def _check_ids(output: Path, rows: int) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    ids = pq.read_table(output, columns=["id"])["id"]
    different = pc.count_distinct(ids).as_py()
    if not len(ids) == different == rows:
        raise RuntimeError(f"{output} has {len(ids)} rows with {different} ids instead of {rows} of each")


if __name__ == "__main__":
    sys.exit(main())
