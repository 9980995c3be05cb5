"""Parquet files, opened in one way everywhere, and their footers, parsed in a process of its own.

On some footers (an encrypted column, a flipped bit) Arrow ends the process that reads them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.process import EndedError, Process, serve
from pipeline.retries import transient

SECONDS = 120.0
"""A footer that is not parsed by then never will be."""
_TAIL = 1 << 16
"""Bytes read at a file's end at first; few footers are longer."""


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning needs of a file's footer."""

    groups: tuple[int, ...]
    """Rows of each row group."""
    size: int
    """Bytes of all row groups, compressed."""
    schema: pa.Schema
    digest: str
    """Of the footer's bytes, which hold sizes, offsets and statistics."""


def open_parquet(source: IO[bytes] | pa.NativeFile | str) -> pq.ParquetFile:
    """The file with its checksums verified, where it has any.

    INT96 timestamps come in microseconds: in nanoseconds, Arrow's default, 9999-12-31 comes out as 1816.
    """
    return pq.ParquetFile(source, coerce_int96_timestamp_unit="us", page_checksum_verification=True)


def damaged(error: Exception) -> bool:
    """Whether bytes that came are no parquet, rather than bytes that did not come: Arrow's own errors carry no number."""
    if transient(error):
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def tail(read: Callable[[int, int], bytes], size: int) -> bytes:
    """The end of a file of ``size`` bytes, from its footer on, as far as that can be told; ``read`` takes a range of bytes."""
    last = read(max(0, size - _TAIL), size) if size else b""
    if last[-4:] not in (b"PAR1", b"PARE"):
        # Whatever it is, its length of a footer is none.
        return last[-8:]
    footer = int.from_bytes(last[-8:-4], "little") + 8
    return read(size - footer, size) if len(last) < footer <= size else last[-footer:]


class FooterReader(Process):
    """One process that parses footers, for one thread at a time."""

    def __init__(self) -> None:
        super().__init__("pipeline.parquet", SECONDS)

    def __call__(self, data: bytes) -> Footer:
        """The footer in what ``tail`` returned. Raises ``ValueError``, saying why, where it can't be read."""
        try:
            found = pickle.loads(self.ask(data))  # noqa: S301 - our own process's, of our own types
        except TimeoutError:
            raise ValueError(f"its footer can't be parsed in {self.seconds:g} s") from None
        except EndedError as error:
            if error.code >= 0:
                raise RuntimeError(f"the process that parses footers can't run: {error}") from None
            raise ValueError(f"its footer ends Arrow's reader, {error}: a column is encrypted, or bytes are damaged") from None
        if isinstance(found, str):
            raise ValueError(found)
        return Footer(*found)


def _answer(data: bytes) -> Sequence[bytes]:
    try:
        file = open_parquet(io.BytesIO(data))
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        size = sum(g.column(c).total_compressed_size for g in groups for c in range(g.num_columns))
        found = (tuple(g.num_rows for g in groups), size, file.schema_arrow, hashlib.sha256(data).hexdigest()[:16])
        return [pickle.dumps(found)]
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make Arrow raise, some of it no error of its own
        return [pickle.dumps((str(error).splitlines() or [type(error).__name__])[0].rstrip("."))]


if __name__ == "__main__":
    serve(_answer)
