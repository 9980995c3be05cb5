from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import units
from pipeline.storage import Storage
from pipeline.units import Shard, bytes_fetched, part_of, plan_units

SCHEMA = pa.schema([])


def ranges(*groups: int, unit_rows: int, limit: int | None = None) -> list[tuple[int, int]]:
    planned = plan_units([Shard("s.parquet", groups, 0, SCHEMA)], unit_rows, limit)
    return [(u.start, u.stop) for u in planned]


def test_whole_row_groups_where_they_fit() -> None:
    assert ranges(40, 40, 40, 40, unit_rows=100) == [(0, 80), (80, 160)]
    assert ranges(100, 100, unit_rows=100) == [(0, 100), (100, 200)]
    assert ranges(300, unit_rows=100) == [(0, 100), (100, 200), (200, 300)]
    assert ranges(250, 10, unit_rows=100) == [(0, 83), (83, 166), (166, 250), (250, 260)]
    assert ranges(10, 250, unit_rows=100) == [(0, 10), (10, 93), (93, 176), (176, 260)]
    assert ranges(0, 5, 0, unit_rows=100) == [(0, 5)]
    assert ranges(unit_rows=100) == []


@pytest.mark.parametrize("unit_rows", [1, 7, 64, 1000])
def test_units_cover_every_row_once(unit_rows: int) -> None:
    cuts = ranges(3, 100, 0, 1, 64, 7, 500, unit_rows=unit_rows)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == 675
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    assert max(stop - start for start, stop in cuts) <= unit_rows


def test_limit() -> None:
    assert ranges(40, 40, unit_rows=40, limit=50) == [(0, 40), (40, 50)]
    assert ranges(40, 40, unit_rows=40, limit=40) == [(0, 40)]


@pytest.mark.parametrize("limit", [None, 1, 41, 60, 99, 100])
@pytest.mark.parametrize("unit_rows", [1, 2, 7, 30, 64])
def test_only_cuts_inside_a_row_group_move_and_never_meet(unit_rows: int, limit: int | None) -> None:
    groups = (3, 100, 0, 1, 64, 7, 500)
    planned = plan_units([Shard("s.parquet", groups, 0, SCHEMA)], unit_rows, limit)
    edges = set(accumulate(groups))
    for a, b in pairwise(planned):
        assert a.stop_reach == b.start_reach
        assert (b.start_reach > 0) == (b.start not in edges and min(a.rows, b.rows) > 1)
    for unit in planned:
        # However late it starts, there are rows in it.
        assert unit.start + unit.start_reach < unit.stop
        assert unit.rows + unit.stop_reach <= 1.5 * unit_rows
    assert planned[0].start_reach == planned[-1].stop_reach == 0


def test_a_limit_ends_the_plan_hard() -> None:
    planned = plan_units([Shard(name, (40,), 0, SCHEMA) for name in "abc"], 20, 70)
    assert [(u.shard, u.start, u.stop, u.start_reach, u.stop_reach) for u in planned] == [
        ("a", 0, 20, 0, 10),
        ("a", 20, 40, 10, 0),
        ("b", 0, 20, 0, 5),
        ("b", 20, 30, 5, 0),
    ]


def test_heavy_rows_make_smaller_units() -> None:
    heavy = Shard("s.parquet", (64,), 64 * 32 * 2**20, SCHEMA)
    assert {u.rows for u in plan_units([heavy], 64)} == {8}


def test_names_follow_from_shard_and_range() -> None:
    shards = [Shard(name, (5,), 0, SCHEMA) for name in ("a/x.parquet", "b/x.parquet", "b/_y.parquet", "b/.hidden")]
    names = [u.name for u in plan_units(shards, 100)]
    assert len(set(names)) == 4
    assert names == [u.name for u in plan_units(shards, 100)]
    # Parquet readers skip names that begin with a dot or an underscore.
    assert not any(n.startswith((".", "_")) for n in names)
    assert names[0].endswith("-0000000-0000005")


def test_footers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(10)}), tmp_path / "a.parquet", row_group_size=4)
    (shard,) = units.read_footers(Storage(str(tmp_path)), ["a.parquet"])
    assert shard.groups == (4, 4, 2)
    assert shard.rows == 10
    assert shard.size > 0
    before = units.input_digest([shard])
    pq.write_table(pa.table({"a": range(11)}), tmp_path / "a.parquet", row_group_size=4)
    assert units.input_digest(units.read_footers(Storage(str(tmp_path)), ["a.parquet"])) != before


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"x" * 40 + b"PAR1"])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"^bad\.parquet is not a parquet file"):
        units.read_footers(Storage(str(tmp_path)), ["bad.parquet"])


def test_parts_are_disjoint_whole_and_parted_where_no_cut_can_move() -> None:
    shards = [Shard(f"{i}.parquet", (10, 25, 7), 1000, pa.schema([])) for i in range(5)]
    units = plan_units(shards, 8)
    for n in (1, 2, 3, 7):
        parts = [part_of(units, i, n) for i in range(1, n + 1)]
        assert [unit for part in parts for unit in part] == units
        assert all(part[0].start_reach == 0 for part in parts if part)
        assert max(map(len, parts)) <= len(units) // n + 4
    assert sum(map(bool, (part_of(units, i, 100) for i in range(1, 101)))) < 100


@pytest.mark.parametrize(
    ("groups", "unit_rows", "times"),
    [
        ((100, 100), 100, 1.0),
        ((50, 50, 100), 100, 1.0),
        ((1000,), 100, 10.0),
        ((100, 0, 300), 100, 2.5),
        ((10,) * 40, 100, 1.0),
    ],
)
def test_what_is_fetched_of_row_groups_larger_than_units(groups: tuple[int, ...], unit_rows: int, times: float) -> None:
    shards = [Shard("s.parquet", groups, 1000 * sum(groups), SCHEMA)]
    planned = plan_units(shards, unit_rows)
    assert bytes_fetched(shards, planned) == pytest.approx(times * shards[0].size, rel=1e-3)
    assert bytes_fetched(shards, planned[:1]) == pytest.approx(planned[0].bytes * max(1, groups[0] / unit_rows), rel=1e-3)
