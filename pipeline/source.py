"""Reading: one Ray Data read task a unit, whose rows travel as one row so that nothing on the way can split them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline import cells, schema
from pipeline.convert import convert
from pipeline.cuts import find_cut
from pipeline.parquet import damaged, open_parquet
from pipeline.schema import Columns
from pipeline.storage import Storage
from pipeline.units import Unit, row_id

if TYPE_CHECKING:
    from ray.data.context import DataContext

READ_SECONDS = "read_seconds"
_BATCH = 64


@dataclass(frozen=True, slots=True)
class UnitReader:
    """Reads a unit's rows. Picklable and small: it rides in every read task."""

    root: Storage
    columns: Columns
    image_roots: tuple[Storage, ...] = ()
    """Where else images may lie."""

    def __call__(self, unit: Unit) -> list[Block]:
        """One block of one row: ``unit``, ``rows`` (large list of ``Columns.unit_row()``) and ``read_seconds``.

        The rows are those of the unit's real range. Raises ``ValueError`` where the shard has fewer rows than its footer said
        at planning.
        """
        began = time.perf_counter()
        rows = self.root.patiently(lambda: self._read(unit))
        packed = pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows)
        seconds = pa.array([time.perf_counter() - began])
        return [pa.table({schema.UNIT: pa.array([unit.name]), schema.ROWS: packed, READ_SECONDS: seconds})]

    def _read(self, unit: Unit) -> pa.StructArray:
        start, stop = unit.start, unit.stop
        try:
            with self._open(unit, self.columns.read) as found:
                start, stop = found.cut(unit.start, unit.start_reach), found.cut(unit.stop, unit.stop_reach)
                rows = self._rows(unit.shard, start, found.between(start, stop))
        except (pa.ArrowException, OSError) as error:
            # A store that does not answer ends the task, and the run can be continued; damaged bytes stay damaged.
            if not damaged(error):
                raise
            return self._unreadable(unit, start, stop, error)
        return rows

    @contextmanager
    def _open(self, unit: Unit, columns: Sequence[str]) -> Iterator[_Rows]:
        """The rows of the unit's row groups, with those of ``columns`` that the shard has."""
        fs, _ = self.root.open()
        with fs.open(self.root.path(unit.shard), "rb") as handle:
            file = open_parquet(handle)
            names = [n for n in columns if n in file.schema_arrow.names]
            groups: list[int] = []
            first = offset = 0
            for i in range(file.num_row_groups):
                rows = file.metadata.row_group(i).num_rows
                if offset < unit.stop and offset + rows > unit.start:
                    first = offset if not groups else first
                    groups.append(i)
                offset += rows
            # In small batches, as a column chunk over 2 GiB comes in no one array.
            batches = file.iter_batches(_BATCH, row_groups=groups, columns=names, use_threads=False)
            yield _Rows(unit, batches, first, names, self.columns.image)

    def _rows(self, shard: str, start: int, table: pa.Table) -> pa.StructArray:
        """``table``, whose first row is the shard's row ``start``, as rows of ``Columns.unit_row()``."""
        columns, count = self.columns, table.num_rows
        kinds = zip(columns.passed, columns.types.types, strict=True)
        arrays = [
            convert(table[name], kind) if name in table.column_names else pa.nulls(count, kind) for (name, _), kind in kinds
        ]
        ids = _ids(shard, start, cells.strings(table[columns.id]) if columns.id else [None] * count)
        questions = cells.strings(table[columns.question]) if columns.question else [None] * count
        own = [
            pa.array(ids, pa.string()),
            pa.array(questions, pa.large_string()),
            cells.image_lists(table[columns.image], (self.root, *self.image_roots), shard),
        ]
        return pa.StructArray.from_arrays([*arrays, *own], fields=list(columns.unit_row()))

    def _unreadable(self, unit: Unit, start: int, stop: int, error: Exception) -> pa.StructArray:
        """Rows of nulls, each with an image that tells why, and with its own id where that column can be read."""
        count = stop - start
        given: Sequence[str | None] = [None] * count
        if self.columns.id:
            try:
                with self._open(unit, [self.columns.id]) as found:
                    given = cells.strings(found.between(start, stop)[self.columns.id])
            except (pa.ArrowException, OSError) as further:
                if not damaged(further):
                    raise
        said = f"{unit.shard}, rows {start} to {stop}: {' '.join(str(error).split())}"
        arrays = [pa.nulls(count, kind) for kind in self.columns.types.types]
        own = [
            pa.array(_ids(unit.shard, start, given), pa.string()),
            pa.nulls(count, pa.large_string()),
            pa.array([[{"bytes": None, "error": said}]] * count, pa.large_list(schema.IMAGE_TYPE)),
        ]
        return pa.StructArray.from_arrays([*arrays, *own], fields=list(self.columns.unit_row()))


def _ids(shard: str, start: int, given: Sequence[str | None]) -> list[str]:
    """The rows' ids, from the shard's row ``start`` on: their own, else made of shard and row."""
    return [row_id(shard, start + i) if value is None else value for i, value in enumerate(given)]


class _Rows:
    """A unit's row groups, read in order and no further than asked for; rows are named by their index in the shard.

    Args:
        unit: rows from the one before its start on are kept.
        batches: the row groups' rows.
        at: index of the first of them.
        names: columns, in the order in which a table has them.
        image: column of images.
    """

    def __init__(self, unit: Unit, batches: Iterator[pa.RecordBatch], at: int, names: Sequence[str], image: str) -> None:
        self._unit, self._batches, self._at, self._names, self._image = unit, batches, at, names, image
        self._kept_from = max(unit.start - 1, at)
        self._kept: list[pa.RecordBatch] = []
        self._damage: Exception | None = None

    def cut(self, nominal: int, reach: int) -> int:
        """Where the cut really lies. Never raises for damaged rows: both units beside them then keep the nominal cut."""
        return find_cut(nominal, reach, self._cell)

    def between(self, start: int, stop: int) -> pa.Table:
        """Rows ``start`` to ``stop`` as they stand in the shard.

        Raises Arrow's exception where they are damaged, ``ValueError`` where there are not so many.
        """
        self._read(stop)
        if self._at < stop and self._damage is not None:
            raise self._damage
        if self._at < stop:
            raise ValueError(f"{self._unit.shard} has changed: rows {start} to {stop} are no longer there")
        return pa.Table.from_batches(self._kept).slice(start - self._kept_from, stop - start).select(self._names)

    def _cell(self, index: int) -> pa.Scalar | None:
        self._read(index + 1)
        if index >= self._at:
            return None
        # It is in one of the last batches.
        first = self._at
        for batch in reversed(self._kept):
            first -= batch.num_rows
            if index >= first:
                return batch.column(self._image)[index - first]
        return None

    def _read(self, stop: int) -> None:
        """Reads on to row ``stop``, or as far as rows can be had."""
        while self._at < stop and self._damage is None:
            try:
                batch = next(self._batches, None)
            except (pa.ArrowException, OSError) as error:
                if not damaged(error):
                    raise
                self._damage = error
                return
            if batch is None:
                return
            skipped = min(max(self._kept_from - self._at, 0), batch.num_rows)
            self._at += batch.num_rows
            if skipped < batch.num_rows:
                self._kept.append(batch.slice(skipped))


class UnitSource(Datasource):
    """A Ray Data source of one-row blocks, one a unit."""

    def __init__(self, reader: UnitReader, units: Sequence[Unit]) -> None:
        super().__init__()
        # Ray asks for the tasks several times a run.
        self._tasks = [
            ReadTask(
                partial(reader, unit),
                BlockMetadata(num_rows=1, size_bytes=max(1, unit.bytes), input_files=None, exec_stats=None),
            )
            for unit in units
        ]

    def get_name(self) -> str:
        return "Units"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(task.metadata.size_bytes or 0 for task in self._tasks)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return self._tasks


def block_rows(blocks: Iterable[Block]) -> Iterable[tuple[str, pa.StructArray, pa.Table]]:
    """Each unit in the blocks: its name, its rows, and the one-row table it came in."""
    for block in blocks:
        table = block if isinstance(block, pa.Table) else pa.Table.from_pandas(block)
        for i in range(table.num_rows):
            row = table.slice(i, 1)
            rows = row[schema.ROWS].combine_chunks()
            rows = rows.chunk(0) if isinstance(rows, pa.ChunkedArray) else rows
            yield row[schema.UNIT][0].as_py(), rows.flatten(), row
