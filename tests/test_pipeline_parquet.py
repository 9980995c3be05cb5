"""Parquet files as they come: what Arrow can't survive, what it takes for something else, what a checksum tells."""

from __future__ import annotations

import base64
import datetime
import io
import random
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from pipeline import units
from pipeline.parquet import FooterReader, open_parquet, tail
from pipeline.storage import Storage


class Keys(encryption.KmsClient):
    """Keys that hide nothing."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, _: str) -> bytes:
        return base64.b64decode(wrapped)


def encrypted(path: Path, table: pa.Table, *columns: str, footer: bool = False) -> None:
    asked = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": list(columns)}, plaintext_footer=not footer, double_wrapping=False
    )
    factory = encryption.CryptoFactory(Keys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), asked)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


TABLE = pa.table({"image": pa.array([b"x"] * 3), "question": ["a", "b", "c"]})


@pytest.mark.parametrize("footer", [False, True])
def test_an_encrypted_column_is_refused_by_its_files_name(tmp_path: Path, footer: bool) -> None:
    """With a plaintext footer, Arrow aborts whoever looks at that column's sizes."""
    encrypted(tmp_path / "secret.parquet", TABLE, "question", footer=footer)
    pq.write_table(TABLE, tmp_path / "good.parquet")
    with pytest.raises(ValueError, match=r"^secret\.parquet is not a parquet file that can be read \(.*encrypt.*remove it"):
        units.read_footers(Storage(str(tmp_path)), ["good.parquet", "secret.parquet"])


def test_flipped_bits_in_a_footer_end_nothing() -> None:
    """Each is parsed or refused; on a few of them Arrow would end this process."""
    out = io.BytesIO()
    table = pa.table({"image": pa.array([b"x" * 50] * 30), "question": [str(i) for i in range(30)], "id": range(30)})
    pq.write_table(table, out, row_group_size=10)
    data = out.getvalue()
    (length,) = struct.unpack("<I", data[-8:-4])
    draw = random.Random(0)
    # Three that did, and some more.
    flips = [(52, 1), (32, 1), (53, 1), *((draw.randrange(length), 1 << draw.randrange(8)) for _ in range(100))]
    reader, refused = FooterReader(), 0
    for place, bit in flips:
        broken = bytearray(data[-(length + 8) :])
        broken[place] ^= bit
        try:
            reader(bytes(broken))
        except ValueError:
            refused += 1
    reader.close()
    assert 20 < refused < len(flips)


@pytest.mark.parametrize("columns", [2, 2000])
def test_a_footer_of_any_length_is_read_alone(columns: int) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({f"column {i}": ["a", "b"] for i in range(columns)}), out)
    data, read = out.getvalue(), []

    def ranges(start: int, stop: int) -> bytes:
        read.append((start, stop))
        return data[start:stop]

    end = tail(ranges, len(data))
    assert len(read) <= 2
    reader = FooterReader()
    footer = reader(end)
    reader.close()
    assert footer.groups == (2,)
    assert len(footer.schema) == columns
    assert len(end) == int.from_bytes(data[-8:-4], "little") + 8


def test_int96_keeps_its_century(tmp_path: Path) -> None:
    """As Spark and Impala have written timestamps for years; the last day that SQL knows means never."""
    never = datetime.datetime(9999, 12, 31, 23, 59, 59, 123456)
    table = pa.table({"when": pa.array([never, None], pa.timestamp("us"))})
    # Arrow's own writer goes by way of nanoseconds, which don't reach that far: the twelve bytes are put there by hand.
    near = pa.table({"when": pa.array([datetime.datetime(2000, 1, 1), None], pa.timestamp("ns"))})
    options: dict[str, Any] = {"use_deprecated_int96_timestamps": True, "compression": "none", "use_dictionary": False}
    pq.write_table(near, tmp_path / "a.parquet", **options)
    data = (tmp_path / "a.parquet").read_bytes()
    there = struct.pack("<QI", 0, 2451545)
    days = (never.date() - datetime.date(2000, 1, 1)).days + 2451545
    nanoseconds = ((23 * 60 + 59) * 60 + 59) * 10**9 + 123_456_000
    assert data.count(there) == 1
    (tmp_path / "a.parquet").write_bytes(data.replace(there, struct.pack("<QI", nanoseconds, days)))
    with (tmp_path / "a.parquet").open("rb") as handle:
        assert open_parquet(handle).read() == table
    (shard,) = units.read_footers(Storage(str(tmp_path)), ["a.parquet"])
    assert shard.schema.field("when").type == pa.timestamp("us")


def test_a_flipped_byte_under_a_checksum_is_damage(tmp_path: Path) -> None:
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"question": ["is it red"]}), tmp_path / "a.parquet", **options)
    data = (tmp_path / "a.parquet").read_bytes()
    # Behind the page's header, which may hold the least and the greatest value.
    place = data.index(struct.pack("<I", 9) + b"is it red") + 4
    (tmp_path / "a.parquet").write_bytes(data[:place] + b"is it bed" + data[place + 9 :])
    with (tmp_path / "a.parquet").open("rb") as handle, pytest.raises(OSError, match="CRC checksum verification failed"):
        open_parquet(handle).read()


def test_a_file_that_is_no_parquet_is_not_fetched_for_its_footer() -> None:
    """Its last bytes are no length."""
    read = []

    def ranges(start: int, stop: int) -> bytes:
        read.append(stop - start)
        return b"\x7f" * (stop - start)

    with pytest.raises(ValueError, match="magic bytes not found"):
        FooterReader()(tail(ranges, 5 << 30))
    assert read == [1 << 16]
