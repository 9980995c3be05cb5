"""Another start goes on with the rows that were answered, or is refused: content tells, whatever sizes and times say."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import graph
from pipeline.plan import make_plan
from pipeline.record import RefusalError
from pipeline.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def table(picture: Callable[..., bytes]) -> pa.Table:
    """Twelve rows, some broken, with a column of NaN and one of lists."""
    images = [picture(60 + i, 50, seed=i, format="BMP") for i in range(12)]
    images[3], images[4] = b"broken", None  # type: ignore[call-overload]
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "question": [f"how many {i:02d}" for i in range(12)],
            "id": [f"{i:03d}" for i in range(12)],
            "weight": [float("nan"), None, *(i / 7 for i in range(10))],
            "tags": [["a"], None, [], *([f"{i}"] for i in range(9))],
        }
    )


def save(table: pa.Table, path: Path) -> bytes:
    """A file whose footer says nothing of its values."""
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False, row_group_size=4)
    return path.read_bytes()


def edited(table: pa.Table, column: str, change: Callable[[Any], Any], row: int = 6) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = change(values[row])
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


EDITS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "question": ("question", lambda text: text.replace("how", "who")),
    "image": ("image", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "id": ("id", lambda _: "abc"),
    "number": ("weight", lambda number: number + 1),
    "list": ("tags", lambda _: ["z"]),
}


def test_an_edited_shard_is_refused_and_a_copied_one_goes_on(config: Any, table: pa.Table, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save(table.set_column(2, "id", pa.array([f"x{i}" for i in range(12)])), folder / "other.parquet")
    shard = folder / "shard.parquet"
    original = save(table, shard)
    settings = {"input": str(folder), "output": str(tmp_path / "out"), "unit_rows": 4}
    graph.run(make_plan(config(**settings)))
    said: list[str] = []

    def again(**more: Any) -> Any:
        said.clear()
        return make_plan(config(**settings, **more), say=said.append)

    assert again().remaining == []
    assert said == []

    # As rsync and a restored backup leave it.
    shard.unlink()
    shard.write_bytes(original)
    assert again().remaining == []
    assert said == ["1 shards were written to since this run began: comparing 12 rows with their answers"]

    times = shard.stat()
    for name, (column, change) in EDITS.items():
        changed = save(edited(table, column, change), shard)
        assert len(changed) == len(original), name
        assert changed != original, name
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(RefusalError, match=r"answers to other rows than shard\.parquet has now \(rows 4 to 8\)"):
            again()
    # What is begun anew has no answers yet.
    assert len(again(overwrite=True).remaining) == 6

    # Only what was answered binds: the edited rows are in a unit that is still to come.
    (unit,) = (name for name in again(overwrite=True).units if (name.shard, name.start) == ("shard.parquet", 4))
    (tmp_path / f"out/{unit.name}.parquet").unlink()
    plan = again()
    assert [left.name for left in plan.remaining] == [unit.name]
    graph.run(plan)
    answers = pq.read_table(tmp_path / "out").to_pylist()
    assert len(answers) == 24
    assert sum(row["tags"] == ["z"] for row in answers) == 1
    # And what was gone on with is what the next start finds.
    assert again().remaining == []
    assert said == []


def test_a_shard_on_s3(config: Any, table: pa.Table, tmp_path: Path, s3: dict[str, Any]) -> None:
    root = Storage(f"s3://bucket/{tmp_path.name}", s3)
    root.write("in/a.parquet", save(table, tmp_path / "a"), temporary="")
    settings = {"input": f"{root.url}/in", "output": f"{root.url}/out", "storage_options": s3}
    graph.run(make_plan(config(**settings)))
    assert make_plan(config(**settings)).remaining == []
    root.write("in/a.parquet", save(edited(table, *EDITS["question"]), tmp_path / "a"), temporary="")
    with pytest.raises(RefusalError, match=r"other rows than a\.parquet has now"):
        make_plan(config(**settings))
