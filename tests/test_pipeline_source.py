"""Units as they are read: where cuts between images really lie, and that no row is lost or doubled by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema, units
from pipeline.cuts import find_cut, same_images
from pipeline.source import UnitReader
from pipeline.storage import Storage
from pipeline.units import Unit, plan_units, row_id

SHARD = "shard.parquet"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

# Each kind of cell: its type, and the cell of image number n in row i. Names differ from row to row where bytes decide.
KINDS: dict[str, tuple[pa.DataType, Callable[[int, int], Any]]] = {
    "bytes": (pa.binary(), lambda n, i: b"image %d" % n),
    "struct": (STRUCT, lambda n, i: {"bytes": b"image %d" % n, "path": f"{i}.png"}),
    "struct of path": (STRUCT, lambda n, i: {"bytes": None, "path": f"{n}.png"}),
    "uri": (pa.string(), lambda n, i: f"images/{n}.png"),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), lambda n, i: f"images/{n}.png"),
    "list of bytes": (pa.large_list(pa.binary()), lambda n, i: [b"first of all", b"image %d" % n]),
    "list of structs": (pa.list_(STRUCT), lambda n, i: [{"bytes": b"image %d" % n, "path": f"{i}.png"}] * 2),
}


def write(folder: Path, images: Sequence[int | None], groups: Sequence[int], kind: str) -> tuple[UnitReader, units.Shard]:
    """A shard of ``images``, by number, in row groups of the given sizes; its reader and its footer."""
    arrow, cell = KINDS[kind]
    cells = pa.array([None if n is None else cell(n, i) for i, n in enumerate(images)], arrow)
    table = pa.table({"image": cells, "n": range(len(images))})
    with pq.ParquetWriter(folder / SHARD, table.schema) as writer:
        for start, stop in pairwise(accumulate(groups, initial=0)):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    root = Storage(str(folder))
    (shard,) = units.read_footers(root, [SHARD])
    assert list(shard.groups) == list(groups)
    columns = schema.plan_columns([(SHARD, shard.schema)], image="image", question=None, id=None, answer=None)
    return UnitReader(root, columns), shard


def read(reader: UnitReader, unit: Unit) -> list[dict[str, Any]]:
    (block,) = reader(unit)
    rows: list[dict[str, Any]] = block[schema.ROWS][0].as_py()
    return rows


def runs(draw: random.Random, rows: int, longest: int) -> list[int | None]:
    """Image numbers in runs of up to ``longest`` rows, each run unlike its neighbours; some runs are of rows without image."""
    images: list[int | None] = []
    while len(images) < rows:
        images += [len(images) if draw.random() < 0.8 else None] * draw.randint(1, longest)
    return images[:rows]


def parted(images: Sequence[int | None], cut: int) -> bool:
    """Whether a cut before row ``cut`` comes between two rows of one image."""
    return cut > 0 and images[cut] is not None and images[cut - 1] == images[cut]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_real_ranges_part_the_shard_between_images(tmp_path: Path, kind: str, seed: int) -> None:
    draw = random.Random(f"{kind} {seed}")
    groups = [draw.choice((0, 1, draw.randint(1, 30), draw.randint(30, 200))) for _ in range(draw.randint(1, 4))] + [3]
    images = runs(draw, sum(groups), longest=draw.choice((1, 3, 8, 40)))
    reader, shard = write(tmp_path, images, groups, kind)
    (whole,) = plan_units([shard], 10**6)
    uncut = read(reader, whole)
    assert [row["id"] for row in uncut] == [row_id(SHARD, i) for i in range(shard.rows)]

    planned = plan_units([shard], unit_rows := draw.randint(1, 60))
    found = [read(reader, unit) for unit in planned]
    # In order, none lost, none doubled, and each as an uncut read has it.
    assert [row for rows in found for row in rows] == uncut
    assert all(0 < len(rows) <= unit_rows * 1.5 for rows in found)
    # Every cut is the first place in reach that parts no image, else the nominal one.
    for unit, rows in zip(planned, found, strict=True):
        reachable = range(unit.start, unit.start + unit.start_reach + 1)
        assert rows[0]["n"] == next((i for i in reachable if not parted(images, i)), unit.start)


def test_a_few_questions_an_image_are_never_parted(tmp_path: Path) -> None:
    images = [i // 7 for i in range(700)]
    reader, shard = write(tmp_path, images, [700], "struct")
    planned = plan_units([shard], 64)
    assert sum(parted(images, unit.start) for unit in planned) >= 5
    assert [read(reader, unit)[0]["n"] % 7 for unit in planned] == [0] * 11


def test_one_image_throughout_is_cut_nominally(tmp_path: Path) -> None:
    reader, shard = write(tmp_path, [7] * 300, [300], "bytes")
    planned = plan_units([shard], 50)
    assert [len(read(reader, unit)) for unit in planned] == [unit.rows for unit in planned] == [50] * 6


@pytest.mark.parametrize("groups", [(60,), (13, 40, 7)])
def test_limit_is_exact_wherever_it_falls(tmp_path: Path, groups: tuple[int, ...]) -> None:
    reader, shard = write(tmp_path, [i // 4 for i in range(60)], groups, "bytes")
    for limit in range(1, 61):
        planned = plan_units([shard], 9, limit)
        assert [row["n"] for unit in planned for row in read(reader, unit)] == list(range(limit))


def test_damage_past_a_cut_spoils_no_unit_before_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    images = [i // 5 for i in range(400)]
    content = [draw.randbytes(500) for _ in range(80)]
    table = pa.table({"image": pa.array([content[n] for n in images], pa.binary()), "n": range(400)})
    small = {"data_page_size": 2000, "write_batch_size": 4, "use_dictionary": False, "compression": "zstd"}
    pq.write_table(table, tmp_path / SHARD, row_group_size=400, **small)
    root = Storage(str(tmp_path))
    (shard,) = units.read_footers(root, [SHARD])
    columns = schema.plan_columns([(SHARD, shard.schema)], image="image", question=None, id=None, answer=None)
    planned = plan_units([shard], 30)
    whole = (tmp_path / SHARD).read_bytes()
    half = set()
    for place in range(len(content[0]), int(shard.size * 0.9), 4999):
        (tmp_path / SHARD).write_bytes(whole[:place] + b"\xff" * 600 + whole[place + 600 :])
        found = [read(UnitReader(root, columns), unit) for unit in planned]
        assert [row["id"] for rows in found for row in rows] == [row_id(SHARD, i) for i in range(400)]
        good = [all(row["images"][0]["error"] is None for row in rows) for rows in found]
        assert good == sorted(good, reverse=True)
        half.add(sum(good))
        # Cuts before the damage lie between images, as ever.
        assert all(rows[0]["n"] % 5 == 0 for rows, fine in zip(found, good, strict=True) if fine)
    assert len(half) > 3


def test_a_shard_that_has_become_shorter_is_told(tmp_path: Path) -> None:
    reader, shard = write(tmp_path, list(range(20)), [20], "bytes")
    *_, last = plan_units([shard], 10)
    write(tmp_path, list(range(15)), [15], "bytes")
    with pytest.raises(ValueError, match=r"shard\.parquet has changed: rows 10 to 20"):
        reader(last)


@pytest.mark.parametrize(
    ("images", "cut", "reach", "real", "last"),
    [
        ("aabbcc", 2, 2, 2, 2),
        ("aaabcc", 2, 2, 3, 3),
        ("aaaabb", 2, 2, 4, 4),
        ("aaaaab", 2, 2, 2, 4),
        ("aaa", 2, 2, 2, 3),
        ("aaabbb", 2, 0, 2, None),
    ],
)
def test_a_cut_looks_no_further_than_the_first_difference(
    images: str, cut: int, reach: int, real: int, last: int | None
) -> None:
    asked: list[int] = []

    def cell(index: int) -> pa.Scalar | None:
        asked.append(index)
        return pa.scalar(images[index]) if index < len(images) else None

    assert find_cut(cut, reach, cell) == real
    assert asked == ([] if last is None else list(range(cut - 1, last + 1)))


BROKEN = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"\xff"], pa.binary()).buffers())


@pytest.mark.parametrize(
    ("cells", "same"),
    [
        (pa.array([b"a", b"a"]), True),
        (pa.array([b"a", b"b"]), False),
        (pa.array(["a.png", "a.png"]), True),
        (BROKEN, True),
        (pa.array([b"a", b"a"], pa.binary_view()), True),
        (pa.array(["a", "b", "a"]).dictionary_encode().take(pa.array([0, 2])), True),
        (pa.array([{"bytes": b"a", "path": "x"}, {"bytes": b"a", "path": "y"}], STRUCT), True),
        (pa.array([{"bytes": b"a", "path": "x"}, {"bytes": b"b", "path": "x"}], STRUCT), False),
        (pa.array([{"bytes": b"x", "path": None}, {"bytes": None, "path": "x"}], STRUCT), False),
        (pa.array([{"path": "x", "more": 1}, {"path": "x", "more": 2}]), True),
        (pa.array([[b"a", b"b"], [b"a", b"b"]]), True),
        (pa.array([[b"a", b"b"], [b"b", b"a"]]), False),
        (pa.array([[b"a"], [b"a", b"b"]]), False),
        # Without an image there is nothing to share.
        (pa.nulls(2), False),
        (pa.nulls(2, pa.binary()), False),
        (pa.nulls(2, STRUCT), False),
        (pa.nulls(2, pa.list_(STRUCT)), False),
        (pa.array([b"", b""]), False),
        (pa.array([{"bytes": None, "path": None}] * 2, STRUCT), False),
        (pa.array([{"bytes": b"", "path": "x"}] * 2, STRUCT), False),
        (pa.array([[], []], pa.list_(pa.binary())), False),
        (pa.array([[b"a", None], [b"a", None]]), False),
    ],
)
def test_same_images(cells: pa.Array, same: bool) -> None:
    assert same_images(cells[0], cells[1]) is same
