"""Writing: exactly one parquet file a unit, whole or not at all, then the unit's marker."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import Block
from ray.data.datasource import Datasink

from pipeline import record, schema
from pipeline.source import block_rows
from pipeline.storage import Storage

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import TaskContext


@dataclass(frozen=True, slots=True)
class UnitWriter:
    """Writes a unit's rows to the file that bears its name. Picklable."""

    output: Storage
    columns: pa.Schema
    part: str = ""

    def __call__(self, unit: str, rows: pa.StructArray, stats: dict[str, Any]) -> dict[str, Any]:
        """The unit's statistics, once its file and its marker are there. Writing a unit twice leaves one file.

        Raises ``ValueError`` where not all rows came that the actor had from the reader (``stats["rows"]``). Only data decides
        where a unit really ends, so the plan can't say how many those are; that all units together have the plan's rows is
        ``Plan.check_rows``.
        """
        if len(rows) != stats["rows"]:
            raise ValueError(f"unit {unit} came with {len(rows)} rows instead of {stats['rows']}")
        table = pa.Table.from_arrays(rows.flatten(), schema=self.columns)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        temporary = record.UNFINISHED.format(part=self.part)
        self.output.write(f"{unit}.parquet", buffer.getvalue().to_pybytes(), temporary=temporary)
        # Data first: a marker without its file would be a loss, a file without its marker is only done again.
        self.output.write(record.marker(unit), json.dumps(stats).encode(), temporary=temporary)
        return stats


class UnitSink(Datasink[list[dict[str, Any]]]):
    """A Ray Data sink of one-row blocks, one a unit; ``stats`` holds all units' statistics once the run is written."""

    def __init__(self, writer: UnitWriter) -> None:
        self._writer = writer
        self.stats: list[dict[str, Any]] = []

    def get_name(self) -> str:
        return "Units"

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> list[dict[str, Any]]:
        return [
            self._writer(unit, rows, json.loads(table[schema.STATS][0].as_py())) for unit, rows, table in block_rows(blocks)
        ]

    def on_write_complete(self, write_result: Any) -> None:
        self.stats = [stats for returned in write_result.write_returns for stats in returned]
