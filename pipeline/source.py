"""Reading: one Ray Data read task a unit, whose rows travel as one row so that nothing on the way can split them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline import cells, schema
from pipeline.schema import Columns
from pipeline.storage import Storage
from pipeline.units import Unit, damaged, row_id

if TYPE_CHECKING:
    from ray.data.context import DataContext

READ_SECONDS = "read_seconds"
_BATCH = 64


@dataclass(frozen=True, slots=True)
class UnitReader:
    """Reads a unit's rows. Picklable and small: it rides in every read task."""

    root: Storage
    columns: Columns

    def __call__(self, unit: Unit) -> list[Block]:
        """One block of one row: ``unit``, ``rows`` (large list of ``Columns.unit_row()``) and ``read_seconds``."""
        began = time.perf_counter()
        try:
            rows = self._rows(unit, self.read(unit))
        except (pa.ArrowException, OSError) as error:
            # A store that does not answer ends the task, and the run can be continued; damaged bytes stay damaged.
            if not damaged(error):
                raise
            rows = self._unreadable(unit, error)
        packed = pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows)
        seconds = pa.array([time.perf_counter() - began])
        return [pa.table({schema.UNIT: pa.array([unit.name]), schema.ROWS: packed, READ_SECONDS: seconds})]

    def read(self, unit: Unit) -> pa.Table:
        """The unit's rows as they stand in the shard, with those of ``columns.read`` that it has.

        Raises ``ValueError`` where the shard has fewer rows than its footer said at planning.
        """
        fs, _ = self.root.open()
        with fs.open(self.root.path(unit.shard), "rb") as handle:
            file = pq.ParquetFile(handle)
            names = [n for n in self.columns.read if n in file.schema_arrow.names]
            groups: list[int] = []
            first = offset = 0
            for i in range(file.num_row_groups):
                rows = file.metadata.row_group(i).num_rows
                if offset < unit.stop and offset + rows > unit.start:
                    first = offset if not groups else first
                    groups.append(i)
                offset += rows
            # In small batches, as a column chunk over 2 GiB comes in no one array.
            pieces, at = [], first
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=names, use_threads=False):
                begin, end = max(unit.start - at, 0), min(unit.stop - at, batch.num_rows)
                if begin < end:
                    pieces.append(batch.slice(begin, end - begin))
                at += batch.num_rows
                if at >= unit.stop:
                    break
        table = pa.Table.from_batches(pieces).select(names) if pieces else pa.table({})
        if table.num_rows != unit.rows:
            raise ValueError(f"{unit.shard} has changed: rows {unit.start} to {unit.stop} are no longer there")
        return table

    def _rows(self, unit: Unit, table: pa.Table) -> pa.StructArray:
        columns = self.columns
        kinds = zip(columns.passed, columns.types.types, strict=True)
        arrays = [
            _cast(table[name], kind) if name in table.column_names else pa.nulls(unit.rows, kind) for (name, _), kind in kinds
        ]
        given = cells.strings(table[columns.id]) if columns.id else [None] * unit.rows
        ids = [row_id(unit.shard, unit.start + i) if value is None else value for i, value in enumerate(given)]
        questions = cells.strings(table[columns.question]) if columns.question else [None] * unit.rows
        own = [
            pa.array(ids, pa.string()),
            pa.array(questions, pa.large_string()),
            cells.image_lists(table[columns.image], self.root, unit.shard),
        ]
        return pa.StructArray.from_arrays([*arrays, *own], fields=list(columns.unit_row()))

    def _unreadable(self, unit: Unit, error: Exception) -> pa.StructArray:
        """Rows of nulls, each with an image that tells why."""
        said = f"{unit.shard}, rows {unit.start} to {unit.stop}: {' '.join(str(error).split())}"
        arrays = [pa.nulls(unit.rows, kind) for kind in self.columns.types.types]
        own = [
            pa.array([row_id(unit.shard, unit.start + i) for i in range(unit.rows)], pa.string()),
            pa.nulls(unit.rows, pa.large_string()),
            pa.array([[{"bytes": None, "error": said}]] * unit.rows, pa.large_list(schema.IMAGE_TYPE)),
        ]
        return pa.StructArray.from_arrays([*arrays, *own], fields=list(self.columns.unit_row()))


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    array = array if array.type == kind else array.cast(kind)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return array
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        # Bytes that are no UTF-8 would make the output unreadable to others.
        raw = array.cast(pa.large_binary()).to_pylist()
        return pa.array([None if value is None else value.decode(errors="replace") for value in raw], kind)
    return array


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
