"""Columns that pass through: no value is lost, no row is lost to one, and all text can be read."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import units
from pipeline.convert import check_values, convert
from pipeline.schema import plan_columns
from pipeline.storage import Storage

BIG = 2**53 + 1


def check(folder: Path, *columns: pa.Array) -> pa.DataType:
    """Plans shards that have ``columns`` under one name; the type that it comes out as."""
    for i, values in enumerate(columns):
        image = pa.nulls(len(values), pa.binary())
        pq.write_table(pa.table({"image": image, "n": values}), folder / f"{i}.parquet")
    root = Storage(str(folder))
    shards = units.read_footers(root, [f"{i}.parquet" for i in range(len(columns))])
    planned = plan_columns([(s.name, s.schema) for s in shards], image="image", question=None, id=None, answer=None)
    check_values(root, shards, units.plan_units(shards, 100), planned)
    return planned.types.field("n").type


DAY = datetime.datetime(9999, 12, 31)
FLOATS = pa.array([0.5, None, float("nan")], pa.float64())
REFUSED: dict[str, tuple[pa.Array, pa.Array]] = {
    "over 2⁵³": (pa.array([1, BIG], pa.int64()), FLOATS),
    "over 2⁶³": (pa.array([2**63], pa.uint64()), pa.array([1], pa.int64())),
    "nested": (pa.array([[1, BIG]], pa.list_(pa.int64())), pa.array([[0.5]], pa.list_(pa.float64()))),
    "in a struct": (pa.array([{"a": BIG}]), pa.array([{"a": 0.5, "b": 1}])),
    "in a map": (
        pa.array([[("a", BIG)]], pa.map_(pa.string(), pa.int64())),
        pa.array([[("a", 0.5)]], pa.map_(pa.string(), pa.float64())),
    ),
    "a far day": (pa.array([DAY], pa.timestamp("us")), pa.array([0], pa.timestamp("ns"))),
    "many digits in a list": (
        pa.array([[decimal.Decimal("1234567890123456789.01"), None]], pa.list_(pa.decimal128(38, 2))),
        pa.array([[float("nan")]], pa.list_(pa.float64())),
    ),
    "many digits in a dictionary": (
        pa.array([decimal.Decimal("1234567890123456789.01")], pa.decimal128(38, 2)).dictionary_encode(),
        FLOATS,
    ),
    "many digits": (pa.array([decimal.Decimal("1234567890123456789.01")], pa.decimal128(38, 2)), FLOATS),
}
HELD: dict[str, tuple[pa.Array, pa.Array, pa.DataType]] = {
    "up to 2⁵³": (pa.array([1, 2**53, None], pa.int64()), FLOATS, pa.float64()),
    "int32": (pa.array([2**31 - 1], pa.int32()), FLOATS, pa.float64()),
    "int32 and float": (pa.array([2**31 - 1], pa.int32()), pa.array([0.5], pa.float32()), pa.float64()),
    "signed and not": (pa.array([2**32 - 1], pa.uint32()), pa.array([-1], pa.int32()), pa.int64()),
    "a near day": (pa.array([DAY.replace(2024)], pa.timestamp("us")), pa.array([0], pa.timestamp("ns")), pa.timestamp("ns")),
    "few digits in a struct": (
        pa.array(
            [{"a": decimal.Decimal("0.10"), "b": float("nan")}], pa.struct([("a", pa.decimal128(9, 2)), ("b", pa.float64())])
        ),
        pa.array([{"a": 0.5}]),
        pa.struct([("a", pa.float64()), ("b", pa.float64())]),
    ),
    "few digits": (pa.array([decimal.Decimal("0.10")], pa.decimal128(10, 2)), FLOATS, pa.float64()),
    "nothing": (pa.nulls(2), pa.array([BIG], pa.int64()), pa.int64()),
    "text and bytes": (pa.array(["é"]), pa.array([b"\xff"], pa.binary()), pa.binary()),
    "a struct that grows": (
        pa.array([{"a": 1, "x": float("nan")}]),
        pa.array([{"a": 2, "b": "c"}]),
        pa.struct([("a", pa.int64()), ("x", pa.float64()), ("b", pa.string())]),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_the_wider_type_does_not_hold_is_refused_at_planning(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^column 'n' is \S.* in 0\.parquet and \S.* for all shards.*give it one type"
    ) as caught:
        check(tmp_path, *REFUSED[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HELD)
def test_values_that_it_holds_are_kept(tmp_path: Path, name: str) -> None:
    first, second, kind = HELD[name]
    assert check(tmp_path, first, second) == kind
    for values in (first, second):
        converted = convert(pa.chunked_array([values]), kind)
        assert converted.type == kind
        assert converted.null_count == values.null_count


def test_damage_hides_no_value_behind_it(tmp_path: Path) -> None:
    """Only as many rows are looked at as the units take."""
    numbers = pa.array([1, 2, BIG], pa.int64())
    path = tmp_path / "0.parquet"
    options: dict[str, Any] = {"row_group_size": 1, "use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(pa.table({"image": pa.nulls(3, pa.binary()), "n": numbers}), path, **options)
    data = bytearray(path.read_bytes())
    place = pq.read_metadata(path).row_group(1).column(1)
    data[place.data_page_offset + place.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    pq.write_table(pa.table({"image": pa.nulls(3, pa.binary()), "n": FLOATS}), tmp_path / "1.parquet")
    root = Storage(str(tmp_path))
    shards = units.read_footers(root, ["0.parquet", "1.parquet"])
    planned = plan_columns([(s.name, s.schema) for s in shards], image="image", question=None, id=None, answer=None)
    said: list[str] = []
    check_values(root, shards, units.plan_units(shards, 1, 2), planned, said.append)
    assert said == ["looking whether the shards' common types hold all values of n in 1 of them"]
    with pytest.raises(ValueError, match="column 'n' is int64 in 0"):
        check_values(root, shards, units.plan_units(shards, 1), planned)


BAD, GOOD = b"caf\xe9 \xff", "caf\ufffd \ufffd"


def text(values: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """Strings of bytes that are none."""
    raw = pa.array(values, pa.binary() if kind == pa.string() else pa.large_binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers(), raw.null_count)


def struct_of(child: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays(
        [child, pa.array(range(len(child)))], names=["said", "n"], mask=pa.array([False, True, False])
    )


def list_of(child: pa.Array, kind: Any = pa.ListArray) -> pa.Array:
    return kind.from_arrays(pa.array([0, None, 2, 3], pa.int64() if kind is pa.LargeListArray else pa.int32()), child)


def map_of(child: pa.Array) -> pa.Array:
    return pa.MapArray.from_arrays(pa.array([0, None, 2, 3], pa.int32()), pa.array(["a", "b", "c"]), child)


NESTED: dict[str, tuple[Any, list[Any]]] = {
    "flat": (lambda child: child, [GOOD, None, "é"]),
    "struct": (struct_of, [{"said": GOOD, "n": 0}, None, {"said": "é", "n": 2}]),
    "list": (list_of, [[GOOD, None], None, ["é"]]),
    "large list": (lambda child: list_of(child, pa.LargeListArray), [[GOOD, None], None, ["é"]]),
    "fixed list": (lambda child: pa.FixedSizeListArray.from_arrays(child, 1), [[GOOD], [None], ["é"]]),
    "map": (map_of, [[("a", GOOD), ("b", None)], None, [("c", "é")]]),
    "list of structs": (
        lambda child: pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), struct_of(child)),
        [[{"said": GOOD, "n": 0}], [None, {"said": "é", "n": 2}]],
    ),
    "struct of lists": (
        lambda child: struct_of(list_of(child)),
        [{"said": [GOOD, None], "n": 0}, None, {"said": ["é"], "n": 2}],
    ),
    "dictionary": (
        lambda child: struct_of(pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int8()), child)),
        [{"said": GOOD, "n": 0}, None, {"said": "é", "n": 2}],
    ),
}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("name", NESTED)
def test_text_that_is_no_utf8_is_repaired_at_any_depth(name: str, kind: pa.DataType) -> None:
    make, expected = NESTED[name]
    made = make(text([BAD, None, "é".encode()], kind))
    for array, values in ((made, expected), (made.slice(1), expected[1:]), (made.slice(0, 1), expected[:1])):
        repaired = convert(array, made.type)
        repaired.validate(full=True)
        assert repaired.type == made.type
        assert repaired.to_pylist() == values
