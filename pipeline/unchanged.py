"""Whether the rows that a run has answered are still those of its input.

A shard's stamp tells cheaply that its bytes may be others. Then the answers themselves, which hold each row's id, columns and
image digest, are laid beside what the shard says now: the same bytes, copied anew, continue the run, others are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import record, schema
from pipeline.schema import Columns
from pipeline.source import UnitReader, block_rows
from pipeline.storage import Storage
from pipeline.units import Shard, Unit

_READERS = 2
"""Each holds a unit with its images."""
_SECONDS = 10.0
"""Between two lines on how far it is."""


def check_unchanged(
    reader: UnitReader,
    output: Storage,
    shards: Sequence[Shard],
    stamps: Mapping[str, str],
    finished: Sequence[Unit],
    say: Callable[[str], object],
) -> None:
    """Raises ``RefusalError`` where a shard has other rows than ``output`` has answers to.

    Args:
        reader: of the input.
        output: where the ``finished`` units are.
        shards: as they are now.
        stamps: theirs when the run was last begun, by name.
    """
    touched = {shard.name for shard in shards if stamps.get(shard.name, shard.stamp) != shard.stamp}
    suspects = [unit for unit in finished if unit.shard in touched]
    if not suspects:
        return
    rows = sum(unit.rows for unit in suspects)
    say(f"{len(touched):,} shards were written to since this run began: comparing {rows:,} rows with their answers")
    said, compared = time.monotonic(), 0
    with ThreadPoolExecutor(_READERS) as pool:
        for unit, same in zip(suspects, pool.map(lambda unit: _same(reader, output, unit), suspects), strict=True):
            if not same:
                pool.shutdown(cancel_futures=True)
                raise record.RefusalError(
                    f"output={output.url!r} holds answers to other rows than {unit.shard} has now (rows {unit.start} to "
                    f"{unit.stop}), which was edited since; choose another folder, or delete that run with --overwrite"
                )
            compared += unit.rows
            if time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                say(f"compared {compared:,} of {rows:,} rows")


def _same(reader: UnitReader, output: Storage, unit: Unit) -> bool:
    ((_, found, _),) = block_rows(reader(unit))
    rows = pa.Table.from_struct_array(found)
    answers = pq.read_table(pa.BufferReader(output.read(f"{unit.name}.parquet")), page_checksum_verification=True)
    return (
        len(rows) == len(answers)
        and rows[schema.ID].to_pylist() == answers[schema.ID].to_pylist()
        and _same_images(rows[schema.IMAGES], answers)
        and _written(rows, reader.columns) == _written(answers, reader.columns)
    )


def _same_images(cells: pa.ChunkedArray, answers: pa.Table) -> bool:
    from pipeline.images import digest, row_digest

    for cell, there, error in zip(cells, *(answers[n].to_pylist() for n in (schema.IMAGE_DIGEST, schema.ERROR)), strict=True):
        files = [member["bytes"] for member in cell.as_py()]
        # An image that a shard points at and that can't be had, now or then, says nothing of the shard.
        if error is None and None not in files and row_digest([digest(file) for file in files]) != there:
            return False
    return True


def _written(rows: pa.Table, columns: Columns) -> bytes:
    """The columns that pass through, as a file has them: what equals there is equal, NaN and null too."""
    arrays = [rows[name].combine_chunks() for name in columns.types.names]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=columns.types), buffer)
    return buffer.getvalue().to_pybytes()
