"""Ids that repeat are refused before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.plan import make_plan


def write(folder: Path, **shards: pa.Array) -> str:
    folder.mkdir()
    for name, ids in shards.items():
        pq.write_table(
            pa.table({"id": ids, "image": pa.nulls(len(ids), pa.binary()), "question": ["a"] * len(ids)}),
            folder / f"{name}.parquet",
        )
    return str(folder)


def test_the_first_repetition_is_named_with_its_places(config: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a=pa.array(["x", "y", None, None]), b=pa.array(["z", "y", "x"]))
    with pytest.raises(ValueError, match=r"id_column='id' repeats 'x' \(a.parquet row 0, b.parquet row 2\) and 1 more"):
        make_plan(config(input=folder, output=str(tmp_path / "out")))
    # What the run does not read may repeat.
    assert make_plan(config(input=folder, output=str(tmp_path / "out"), limit=5)).rows == 5
    made = make_plan(config(input=folder, output=str(tmp_path / "out"), id_column=""))
    assert made.columns.id is None
    assert ("id", "input_id") in made.columns.passed


def test_numbers_and_texts_are_one_id(config: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a=pa.array([1, 2, 3]), b=pa.array([4, 5, 2]))
    with pytest.raises(ValueError, match="repeats '2'"):
        make_plan(config(input=folder, output=str(tmp_path / "out")))


def test_many_ids_are_checked_quickly(config: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a=pa.array(range(300_000)), b=pa.array(range(300_000, 600_000)))
    assert make_plan(config(input=folder, output=str(tmp_path / "out"))).rows == 600_000
