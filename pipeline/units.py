"""What a run is made of: shards and their footers, and units, each a contiguous row range of one shard."""

from __future__ import annotations

import hashlib
import json
import posixpath
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pyarrow as pa

from pipeline.parquet import FooterReader, tail
from pipeline.storage import Storage

UNIT_BYTES = 256 * 2**20
"""Rows of a unit are fewer than asked where they would weigh more than this, compressed."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A parquet file's footer, as far as planning needs it."""

    name: str
    """Path relative to the input's root."""
    groups: tuple[int, ...]
    """Rows of each row group."""
    size: int
    """Bytes of all row groups, compressed."""
    schema: pa.Schema
    footer: str = ""
    """Digest of the footer's bytes."""
    stamp: str = ""
    """Digest of what the store says of the file (an entity tag, times, an inode): it changes with the bytes, and also when the
    same bytes are written again."""

    @property
    def rows(self) -> int:
        return sum(self.groups)

    @property
    def digest(self) -> str:
        """Short digest of the name, by which shards of one stem in several folders stay apart."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:10]


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``start`` to ``stop`` (exclusive) of a shard: read by one task, answered by one actor, written to one file.

    The range is nominal. An end inside a row group may part rows of one image, so whoever reads moves it to the next row with
    another image, at most ``start_reach`` or ``stop_reach`` rows further on (``pipeline.cuts``); the unit beside it does the
    same. Ends at a row group's edge stay where they are, as moving one would make a reader fetch a second row group's images to
    look at a single row. There an image's rows may be parted: it is encoded once more, and with ``kept_sets="image"`` each part
    decides for itself what is kept. Where the cuts lie follows from the input and the configuration alone.
    """

    shard: str
    start: int
    stop: int
    name: str
    """The output file's name without its suffix, decided by shard and nominal range alone."""
    bytes: int
    """Estimate of the rows' size."""
    start_reach: int = 0
    """Rows by which the start may really come later."""
    stop_reach: int = 0
    """Rows by which the stop may really come later; the next unit's ``start_reach``."""

    @property
    def rows(self) -> int:
        """Nominal rows; over all units of a plan they add up to the real ones."""
        return self.stop - self.start


def read_footers(root: Storage, names: Sequence[str]) -> list[Shard]:
    """The shards' footers, fetched side by side. Raises ``ValueError`` for a file that is no parquet or can't be had."""
    with closing(FooterReader()) as reader, ThreadPoolExecutor(16) as pool:
        one_at_a_time = threading.Lock()

        def read(name: str) -> Shard:
            try:
                data, stamp = root.patiently(lambda: _fetch(root, name))
            except Exception as error:
                # Stores say no more than the key, or not even that.
                raise ValueError(f"{name} can't be read from {root.url} ({type(error).__name__}: {error})") from error
            try:
                with one_at_a_time:
                    footer = reader(data)
            except ValueError as error:
                raise ValueError(
                    f"{name} is not a parquet file that can be read ({error}); remove it or name others"
                ) from error
            return Shard(name, footer.groups, footer.size, footer.schema, footer.digest, stamp)

        return list(pool.map(read, names))


def _fetch(root: Storage, name: str) -> tuple[bytes, str]:
    """The file's tail, and its stamp."""
    fs, _ = root.open()
    path = root.path(name)
    info = fs.info(path)
    stamp = hashlib.sha256(repr(sorted(info.items(), key=str)).encode()).hexdigest()[:16]
    return tail(lambda start, stop: fs.cat_file(path, start=start, end=stop), info["size"]), stamp


def plan_units(shards: Sequence[Shard], unit_rows: int, limit: int | None = None) -> list[Unit]:
    """Cuts the shards into units of at most ``unit_rows`` nominal rows, of whole row groups where they fit.

    A row group that is larger than a unit is cut evenly, and its units may really have up to half as many rows again.
    ``limit`` ends the plan after exactly that many rows.
    """
    units: list[Unit] = []
    left = limit
    for shard in shards:
        row_bytes = shard.size / max(1, shard.rows)
        most = max(1, min(unit_rows, int(UNIT_BYTES / max(1.0, row_bytes))))
        rows = shard.rows if left is None else min(left, shard.rows)
        left = None if left is None else left - rows
        ranges = [(start, min(stop, rows)) for start, stop in _ranges(shard.groups, most) if start < rows]
        reach = _reaches(ranges, shard.groups)
        for start, stop in ranges:
            name, size = unit_name(shard, start, stop), int((stop - start) * row_bytes)
            units.append(Unit(shard.name, start, stop, name, size, reach.get(start, 0), reach.get(stop, 0)))
    return units


def rows_used(units: Iterable[Unit]) -> dict[str, int]:
    """By shard, how many of its rows the units end at: no later row matters to a run."""
    stops: dict[str, int] = {}
    for unit in units:
        stops[unit.shard] = max(stops.get(unit.shard, 0), unit.stop)
    return stops


def bytes_fetched(shards: Sequence[Shard], units: Sequence[Unit]) -> int:
    """About how much comes from the store so that ``units`` can be read: of each row group that one touches, all."""
    edges = {shard.name: [0, *accumulate(shard.groups)] for shard in shards}
    fetched = 0.0
    for unit in units:
        ends = edges[unit.shard]
        rows = ends[bisect_left(ends, unit.stop)] - ends[bisect_right(ends, unit.start) - 1]
        fetched += rows / unit.rows * unit.bytes
    return int(fetched)


def part_of(units: Sequence[Unit], i: int, n: int) -> list[Unit]:
    """The i-th of ``n`` parts: contiguous, so that each reads its own shards alone, and parted where no cut can move."""

    def edge(k: int) -> int:
        place = len(units) * k // n
        while place < len(units) and units[place].start_reach:
            place += 1
        return place

    return list(units[edge(i - 1) : edge(i)])


def _ranges(groups: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    start = stop = 0
    for rows in groups:
        if stop - start + rows > most and stop > start:
            yield start, stop
            start = stop
        if rows > most:
            pieces = -(-rows // most)
            cuts = [start + rows * i // pieces for i in range(pieces + 1)]
            yield from pairwise(cuts)
            start = stop = cuts[-1]
        else:
            stop += rows
    if stop > start:
        yield start, stop


def _reaches(ranges: Sequence[tuple[int, int]], groups: Sequence[int]) -> dict[int, int]:
    """Rows by which each cut inside a row group may move: half the smaller range beside it, so that cuts never meet."""
    edges = set(accumulate(groups))
    beside = ((start, cut, stop) for (start, cut), (_, stop) in pairwise(ranges))
    return {cut: min(cut - start, stop - cut) // 2 for start, cut, stop in beside if cut not in edges}


def unit_name(shard: Shard, start: int, stop: int) -> str:
    """E.g. ``train-00003-1f0c8c2b77-0000512-0000768``: stem, digest of the path, range."""
    stem = posixpath.basename(shard.name).removesuffix(".parquet").lstrip("._")[:80]
    return f"{stem}-{shard.digest}-{start:07d}-{stop:07d}"


def row_id(shard: str, index: int) -> str:
    """The id of a row that has none: a digest of its shard's relative path and its index there."""
    return hashlib.sha256(f"{shard}\0{index}".encode()).hexdigest()[:24]


def input_digest(shards: Sequence[Shard]) -> str:
    """Tells whether the input is still the one that a run began with, as far as all shards' names and footers do."""
    listing = json.dumps([(s.name, s.groups, s.size, s.footer) for s in shards])
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
