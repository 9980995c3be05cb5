"""Rows of several runs, joined on their ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.comparison.runs import Run
from pipeline import schema

JOIN_ROWS = 500_000
"""Rows of one run that a join holds at once, about."""


def joined(runs: Sequence[Run], columns: Sequence[Sequence[str]]) -> Iterator[pa.Table]:
    """The rows that all ``runs`` have, joined on ``id``: a run's columns bear its place in front, as in ``0.text``.

    Each table holds the rows of one part of the ids, parted by a checksum, so that no more than about ``JOIN_ROWS`` rows of a
    run are in memory; larger runs are read once for each part. Within a table rows are in the order of their ids. Raises
    ``ValueError`` where an id comes twice in a run.
    """
    parts = max(1, -(-max(int(run.stats["rows"]) for run in runs) // JOIN_ROWS))
    for part in range(parts):
        sides = []
        for place, (run, names) in enumerate(zip(runs, columns, strict=True)):
            wanted = [schema.ID, *names]
            kept = pa.concat_tables([t.filter(_in_part(t[schema.ID], part, parts)) for t in run.rows(wanted)])
            _check_unique(run, kept[schema.ID])
            sides.append(kept.rename_columns([schema.ID, *(f"{place}.{name}" for name in names)]))
        table = sides[0]
        for side in sides[1:]:
            table = _join(table, side)
        yield table


def _join(left: pa.Table, right: pa.Table) -> pa.Table:
    """Inner join on unique ids, in their order. By place: Arrow's own join takes no list columns, such as references."""
    places = pc.index_in(left[schema.ID], value_set=right[schema.ID])
    both = pc.is_valid(places)
    left, right = left.filter(both), right.take(places.filter(both)).drop_columns([schema.ID])
    for field, column in zip(right.schema, right.columns, strict=True):
        left = left.append_column(field, column)
    return left.sort_by(schema.ID)


def _in_part(ids: pa.ChunkedArray, part: int, parts: int) -> pa.Array:
    if parts == 1:
        return pa.array(np.ones(len(ids), bool))
    sums = np.fromiter((crc32(id.encode()) for id in ids.to_pylist()), np.uint32, len(ids))
    return pa.array(sums % parts == part)


def _check_unique(run: Run, ids: pa.ChunkedArray) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
    raise ValueError(f"run {run.name!r} has two rows with the id {twice!r}, and rows are joined by their ids")
