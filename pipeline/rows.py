"""One row between its reading and its writing, and what a unit's rows come out as: output columns and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import errors, metrics, schema
from pipeline.schema import Columns

if TYPE_CHECKING:
    from pipeline.engine import Answer


@dataclass(slots=True)
class Row:
    """One row on its way. Exactly one of ``answer`` and ``error`` is set in the end."""

    id: str
    count: int
    """Images in the cell, broken ones among them."""
    files: list[bytes]
    question: str | None = None
    tokens: list[int] = field(default_factory=list)
    tiles: int = 0
    keys: list[str] = field(default_factory=list)
    """Each file's digest: equal files are decoded and encoded once, and tell which rows decide together what is kept."""
    grids: list[tuple[int, int]] = field(default_factory=list)
    answer: Answer | None = None
    error: str | None = None
    digest: str | None = None

    def fail(self, error: Exception | str) -> None:
        """Marks the row as failed; its error reads in one line."""
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.error = " ".join(said.split())[:500]


def pack(rows: Sequence[Row], packed: pa.StructArray, columns: Columns, write_kept: bool) -> pa.StructArray:
    """The unit's output: the columns that pass through, from ``packed``, then each row's own."""
    fields = columns.output(write_kept)
    passed = [packed.field(name) for name in columns.types.names]
    records = [_record(row) for row in rows]
    own = [pa.array([record[f.name] for record in records], f.type) for f in list(fields)[len(passed) :]]
    return pa.StructArray.from_arrays([*passed, *own], fields=list(fields))


def _record(row: Row) -> dict[str, Any]:
    """The row's own output columns."""
    record: dict[str, Any] = dict.fromkeys(f.name for f in schema.OUTPUT_FIELDS + schema.KEPT_FIELDS)
    record |= {schema.ID: row.id, schema.IMAGES: row.count, schema.IMAGE_DIGEST: row.digest}
    if row.answer is None:
        return record | {schema.FINISH_REASON: "error", schema.ERROR: row.error or "never answered"}
    answer = {name: getattr(row.answer, name) for name in row.answer.__slots__}
    grid = [{"columns": columns, "rows": rows} for rows, columns in row.grids]
    return record | answer | {"tiles": row.tiles, schema.TILE_GRID: grid}


def tally(rows: Sequence[Row], packed: pa.StructArray, columns: Columns) -> dict[str, Any]:
    """What a run's summary adds up, for one unit."""
    answers = [row.answer for row in rows if row.answer is not None]
    fractions = [a.keep_fraction for a in answers if a.keep_fraction is not None]
    stats: dict[str, Any] = {
        "rows": len(rows),
        "errors": sum(row.error is not None for row in rows),
        "error_kinds": errors.count((row.id, row.error) for row in rows if row.error is not None),
        "images": sum(row.count for row in rows if row.answer is not None),
        "tiles": sum(row.tiles for row in rows if row.answer is not None),
        "keep_fraction_sum": sum(fractions),
        "keep_fraction_rows": len(fractions),
        "tower_keep_fraction_sum": sum(a.tower_keep_fraction or 0.0 for a in answers),
    }
    for name in ("prompt_tokens", "output_tokens", "cross_kv_bytes_full", "cross_kv_bytes", "self_kv_bytes"):
        stats[name] = sum(getattr(answer, name) for answer in answers)
    if columns.answer_output:
        truths = packed.field(columns.answer_output).to_pylist()
        judged = [(row.answer.text if row.answer else None, truth) for row, truth in zip(rows, truths, strict=True)]
        judged = [pair for pair in judged if pair[1] is not None]
        stats["judged"] = len(judged)
        stats["correct"] = sum(metrics.exact(text, truth) for text, truth in judged)
    return stats
