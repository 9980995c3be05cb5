"""A simple random sample of a data set: of its rows, or of its images with all their rows."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cuts import same_images
from pipeline.parquet import damaged, open_parquet
from pipeline.storage import Storage
from pipeline.units import Shard, Unit, unit_name

Range = tuple[str, int, int]
"""A unit's shard, start and stop."""

_READERS = 8
_BATCH = 64


def pick(shards: Sequence[Shard], rows: int, seed: int) -> list[Range]:
    """``rows`` rows (all, if there are no more), drawn evenly without replacement by ``seed``: each on its own, in their order.

    Neighbours are often alike, and a sample of neighbours proves less. What it costs is reading a row group for each.
    """
    ends = list(accumulate(shard.rows for shard in shards))
    total = ends[-1] if ends else 0
    drawn = sorted(random.Random(seed).sample(range(total), min(rows, total)))
    found = []
    for row in drawn:
        place = bisect_right(ends, row)
        shard, at = shards[place], row - (ends[place] - shards[place].rows)
        found.append((shard.name, at, at + 1))
    return found


def pick_images(root: Storage, column: str, shards: Sequence[Shard], rows: int, seed: int) -> list[Range]:
    """Images, drawn evenly without replacement by ``seed``, each with all of its rows that are adjacent: about ``rows`` rows
    (all, if there are no more).

    Those whose first row is among the rows that ``pick`` draws: every image is as likely, whatever its number of rows, and so
    is every row. To tell them, the row groups of all rows drawn are read. A row without an image stands alone.

    Args:
        root: of the input.
        column: the images'.
        shards: the input's.
        rows: how many to expect.
        seed: as in ``pick``.
    """
    edges = {shard.name: [0, *accumulate(shard.groups)] for shard in shards}

    def group_of(row: Range) -> tuple[str, int]:
        return row[0], bisect_right(edges[row[0]], row[1]) - 1

    def images_in(part: tuple[tuple[str, int], list[int]]) -> list[Range]:
        (name, group), drawn = part
        return root.patiently(lambda: [(name, *found) for found in _images(root, name, column, edges[name], group, drawn)])

    parts = [(key, [row[1] for row in found]) for key, found in groupby(pick(shards, rows, seed), group_of)]
    with ThreadPoolExecutor(_READERS) as pool:
        return [found for images in pool.map(images_in, parts) for found in images]


def units_of(shards: Sequence[Shard], ranges: Sequence[Range]) -> list[Unit]:
    """A unit for each range of a shard that is still there."""
    by_name = {shard.name: shard for shard in shards}
    return [
        Unit(name, start, stop, unit_name(shard, start, stop), (stop - start) * shard.size // max(1, shard.rows))
        for name, start, stop in ranges
        if (shard := by_name.get(name)) is not None
    ]


def _images(
    root: Storage, name: str, column: str, edges: Sequence[int], group: int, drawn: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """(start, stop) of the images in a shard whose first row is among ``drawn``, ascending rows of the row group ``group``.

    They may end in a later group. Rows that are damaged stand alone, and will say so themselves.
    """
    # The row before tells whether a row is an image's first.
    start = drawn[0] - 1 if drawn[0] == edges[group] and drawn[0] else edges[group]
    first = bisect_right(edges, start) - 1
    at, before = edges[first], None
    firsts = set(drawn)
    begun = start if start in firsts else None
    fs, _ = root.open()
    try:
        with fs.open(root.path(name), "rb") as handle:
            for cell in _cells(open_parquet(handle), column, range(first, len(edges) - 1)):
                if at > start and not same_images(before, cell):
                    if begun is not None:
                        yield begun, at
                    begun = at if at in firsts else None
                if begun is None and at >= drawn[-1]:
                    return
                before = cell
                at += 1
    except (pa.ArrowException, OSError) as error:
        if not damaged(error):
            raise
    if begun is not None and begun < at:
        yield begun, at
    yield from ((row, row + 1) for row in drawn if row >= at)


def _cells(file: pq.ParquetFile, column: str, groups: Sequence[int]) -> Iterator[pa.Scalar]:
    """The column's cells, each row group read when it is reached: a batch over two of them would read both."""
    for group in groups:
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[column], use_threads=False):
            yield from batch.column(0)
