"""Whether ids name one row each: answers are joined to their rows by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from pipeline.cells import strings
from pipeline.parquet import damaged, open_parquet
from pipeline.storage import Storage
from pipeline.units import Unit, rows_used

_READERS = 8
_BATCH = 65536


def check_ids(root: Storage, units: Sequence[Unit], column: str) -> None:
    """Reads ``column`` of all units' rows, eight bytes a row in memory. Raises ``ValueError`` where an id comes twice.

    Null ids are made from shard and row, so they never do; those in damaged row groups come out as such too.
    """
    stops = rows_used(units)
    with ThreadPoolExecutor(_READERS) as pool:
        hashes = np.concatenate(list(pool.map(lambda shard: _hashes(root, shard, stops[shard], column), stops)))
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not twice:
        return
    # Different ids may have one hash.
    places: defaultdict[str, list[str]] = defaultdict(list)
    for shard, stop in stops.items():
        for row, id in _ids(root, shard, stop, column):
            if hash(id) in twice:
                places[id].append(f"{shard} row {row}")
    repeated = {id: found for id, found in places.items() if len(found) > 1}
    if repeated:
        id, found = next(iter(repeated.items()))
        more = f" and {len(repeated) - 1:,} more" if len(repeated) > 1 else ""
        raise ValueError(
            f"id_column={column!r} repeats {id!r} ({found[0]}, {found[1]}){more}, and ids must tell rows apart; name another "
            "column, or give id_column='' to have ids made from shard and row"
        )


def _hashes(root: Storage, shard: str, stop: int, column: str) -> np.ndarray:
    return np.fromiter((hash(id) for _, id in _ids(root, shard, stop, column)), np.int64)


def _ids(root: Storage, shard: str, stop: int, column: str) -> Iterator[tuple[int, str]]:
    """(row, id) of the shard's rows below ``stop`` that have an id."""
    fs, _ = root.open()
    row = 0
    try:
        with fs.open(root.path(shard), "rb") as handle:
            for batch in open_parquet(handle).iter_batches(_BATCH, columns=[column], use_threads=False):
                for id in strings(batch.column(0)):
                    if row >= stop:
                        return
                    if id is not None:
                        yield row, id
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if not damaged(error):
            raise
