"""A simple random sample of a data set's rows."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from pipeline.units import Shard, Unit, unit_name


def pick(shards: Sequence[Shard], rows: int, seed: int) -> list[Unit]:
    """``rows`` rows (all, if there are no more), drawn evenly without replacement by ``seed``: a unit for each, in their order.

    Rows one by one, as neighbours are often alike, and a sample of neighbours proves less; what it costs is reading a row group
    for each.
    """
    ends = list(accumulate(shard.rows for shard in shards))
    total = ends[-1] if ends else 0
    drawn = sorted(random.Random(seed).sample(range(total), min(rows, total)))
    units = []
    for row in drawn:
        place = bisect_right(ends, row)
        shard, at = shards[place], row - (ends[place] - shards[place].rows)
        units.append(Unit(shard.name, at, at + 1, unit_name(shard, at, at + 1), shard.size // max(1, shard.rows)))
    return units
