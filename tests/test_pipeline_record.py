"""The sink's files and the run's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import record
from pipeline.record import RefusalError
from pipeline.sink import UnitSink, UnitWriter
from pipeline.storage import Storage

SCHEMA = pa.schema([("id", pa.string()), ("n", pa.int32()), ("kept", pa.list_(pa.int32()))])
STATS: dict[str, Any] = {
    "rows": 2,
    "errors": 1,
    "seconds": {"read": 0.5},
    "device": "CPU",
    "dtype": "float32",
    "peak_memory_bytes": 7,
}


def block(*units: str, rows: int = 2) -> pa.Table:
    array = pa.StructArray.from_arrays(
        [pa.array([str(i) for i in range(rows)]), pa.nulls(rows, pa.int32()), pa.nulls(rows, pa.list_(pa.int32()))],
        fields=list(SCHEMA),
    )
    listed = pa.LargeListArray.from_arrays(pa.array([0, rows], pa.int64()), array)
    one = [pa.table({"unit": [u], "rows": listed, "stats": [json.dumps(STATS)]}) for u in units]
    return pa.concat_tables(one)


def sink(folder: Path) -> UnitSink:
    return UnitSink(UnitWriter(Storage(str(folder)), SCHEMA))


def test_one_file_a_unit_however_blocks_come(tmp_path: Path) -> None:
    units = ("a", "b", "c")
    returned = sink(tmp_path).write([block("a", "b"), block("c")], None)  # type: ignore[arg-type]
    assert returned == [STATS] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".run", "a.parquet", "b.parquet", "c.parquet"]
    for unit in units:
        # All null, and the schema is still the one that was fixed.
        assert pq.read_schema(tmp_path / f"{unit}.parquet") == SCHEMA
    assert list((tmp_path / ".run/unfinished").iterdir()) == []


def test_writing_twice_leaves_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        sink(tmp_path).write([block("a")], None)  # type: ignore[arg-type]
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 2
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_what_is_written_can_be_verified(tmp_path: Path) -> None:
    sink(tmp_path).write([block("a", "b")], None)  # type: ignore[arg-type]
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    place = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    data[place.dictionary_page_offset + place.total_compressed_size - 1] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        pq.read_table(tmp_path / "a.parquet", page_checksum_verification=True)


def test_a_unit_that_lost_rows_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unit a came with 1 rows instead of 2"):
        sink(tmp_path).write([block("a", rows=1)], None)  # type: ignore[arg-type]
    assert list(tmp_path.glob("*.parquet")) == []


def test_data_comes_before_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(Storage, "write", lambda self, name, data, temporary: written.append(name))
    sink(tmp_path).write([block("a")], None)  # type: ignore[arg-type]
    assert written == ["a.parquet", ".run/units/a.json"]


def test_a_unit_is_finished_with_both_file_and_marker(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    units = ["a", "b", "c", "d"]
    assert record.finished(output, units) == []
    sink(tmp_path).write([block(*units)], None)  # type: ignore[arg-type]
    (tmp_path / "b.parquet").unlink()
    (tmp_path / record.marker("c")).unlink()
    assert record.finished(output, units) == ["a", "d"]
    assert record.read_markers(output, ["a", "d"]) == [STATS, STATS]


def begin(folder: Path, decides: dict[str, Any], config: dict[str, Any]) -> None:
    record.begin(Storage(str(folder)), {"decides": decides, "config": config})


def test_a_folder_is_free_ours_or_refused(tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "out"))
    decides, config = {"model": "digest", "seed": 0}, {"model": "m", "seed": 0}
    assert record.check_output(output, decides, config) is False
    begin(tmp_path / "out", decides, config)
    assert record.check_output(output, decides, config) is True
    with pytest.raises(RefusalError, match=r"differs in seed \(0 there, 1 here\)"):
        record.check_output(output, decides | {"seed": 1}, config | {"seed": 1})
    with pytest.raises(RefusalError, match=r"differs in model \(its files have changed\)"):
        record.check_output(output, decides | {"model": "other"}, config)
    files = {"a.json": "1", "b.safetensors": "2", "c.json": "3"}
    begin(tmp_path / "files", {"model": files}, {"model": "m"})
    now = files | {"b.safetensors": "4", "d.json": "5"}
    with pytest.raises(RefusalError, match=r"differs in model \(its files have changed: b\.safetensors, d\.json\)"):
        record.check_output(Storage(str(tmp_path / "files")), {"model": now}, {"model": "m"})
    with pytest.raises(RefusalError, match="another version of this program began"):
        record.check_output(output, decides | {"format": record.FORMAT}, config)
    (tmp_path / "out/.run/run.json").write_text("{")
    with pytest.raises(RefusalError, match="unreadable"):
        record.check_output(output, decides, config)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(RefusalError, match=r"files of something else \(x\.parquet\)"):
        record.check_output(Storage(str(tmp_path)), {}, {})
    with pytest.raises(RefusalError, match="is a file"):
        record.check_output(Storage(str(tmp_path / "x.parquet")), {}, {})


def test_summaries_add_up() -> None:
    first = STATS | {"keep_fraction_sum": 1.5, "keep_fraction_rows": 2, "judged": 2, "correct": 1, "images": 2}
    second = STATS | {
        "keep_fraction_sum": 0.5,
        "keep_fraction_rows": 1,
        "peak_memory_bytes": 9,
        "seconds": {"read": 1.0, "decode": 2.0},
    }
    total = record.summarise([first, second])
    assert (total["rows"], total["errors"], total["images"]) == (4, 2, 2)
    assert total["mean_keep_fraction"] == pytest.approx(2 / 3)
    assert total["accuracy"] == 0.5
    assert total["peak_memory_bytes"] == 9
    assert total["seconds_per_stage"] == {"decode": 2.0, "read": 1.5}
    nothing = record.summarise([STATS])
    assert nothing["mean_keep_fraction"] is nothing["accuracy"] is None


def test_the_bill_adds_up_or_is_unknown() -> None:
    two_gpus = [STATS | {"actor_seconds": 10.5, "gpus": 1.0}, STATS | {"actor_seconds": 4.0, "gpus": 0.5}]
    total = record.summarise(two_gpus)
    assert (total["actor_seconds"], total["gpu_seconds"]) == (14.5, 12.5)
    cpu = record.summarise([STATS | {"actor_seconds": 3.0, "gpus": 0.0}])
    assert (cpu["actor_seconds"], cpu["gpu_seconds"]) == (3.0, 0.0)
    # A run that an earlier version began, whose units do not say.
    mixed = record.summarise([*two_gpus, STATS])
    assert mixed["actor_seconds"] is mixed["gpu_seconds"] is None


def test_what_was_held_adds_up_or_is_unknown() -> None:
    counted = {"cross_kv_byte_seconds": 10.5, "cross_kv_byte_seconds_full": 20.0, "cross_kv_bytes_read": 100}
    first, second = STATS | counted | {"peak_cross_kv_bytes": 7}, STATS | counted | {"peak_cross_kv_bytes": 9}
    total = record.summarise([first, second])
    assert {name: total[name] for name in counted} == {name: 2 * value for name, value in counted.items()}
    assert total["peak_cross_kv_bytes"] == 9
    # A unit without them, from before they were counted: the others' sum would pass for the whole.
    mixed = record.summarise([first, second, STATS])
    assert [mixed[name] for name in counted] == [None] * 3
    assert mixed["peak_cross_kv_bytes"] == 9


def unit_file(number: int) -> str:
    return f"shard-0123456789-{number:07d}-{number + 1:07d}.parquet"


def test_overwriting_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    assert record.own_files(output) == []
    for i in range(3):
        output.write(unit_file(i), b"x", temporary=".run/unfinished")
        output.write(record.marker(unit_file(i).removesuffix(".parquet")), b"{}", temporary=".run/unfinished")
    (tmp_path / "notes.txt").write_text("mine")
    # Without run.json these are somebody's files.
    assert record.own_files(output) == []
    record.begin(output, {"decides": {}, "config": {}})
    record.write_summary(output, {})
    with pytest.raises(RefusalError, match=r"no run wrote \(notes.txt\)"):
        record.own_files(output)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "mine.parquet").write_bytes(b"x")
    with pytest.raises(RefusalError, match=r"mine\.parquet"):
        record.own_files(output)
    (tmp_path / "mine.parquet").unlink()
    names = record.own_files(output)
    assert len(names) == 8
    assert names[-1] == ".run/run.json"
    record.delete(output, names)
    assert output.names() == [".run"]
    assert record.own_files(output) == []
    assert not record.check_output(output, {}, {})
