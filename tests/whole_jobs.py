"""What the tests that hit whole jobs share: their input, and what has to be there in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.soak_job import Job

ROOT = Path(__file__).resolve().parent.parent
ROWS = 48
UNIT = 4


def write_shard(folder: Path, picture: Callable[..., bytes]) -> Path:
    """``ROWS`` rows, ids from 000, ``UNIT`` to a row group: two questions about each of two images in turn."""
    files = [picture(100 + 40 * (i % 4), 80, seed=i) for i in range(ROWS // 2)]
    table = pa.table(
        {
            "image": [files[i // UNIT * 2 + i % 2] for i in range(ROWS)],
            "question": [("how many", "what is this")[i % UNIT // 2] for i in range(ROWS)],
            "id": [f"{i:03d}" for i in range(ROWS)],
        }
    )
    pq.write_table(table, folder / "in.parquet", row_group_size=UNIT)
    return folder / "in.parquet"


def given(shard: Path, model: str) -> list[str]:
    """Options of a job that takes some seconds, all but the output."""
    return ["--input", str(shard), "--model", model, "--unit-rows", str(UNIT), "--max-new-tokens", "48"]


def start(shard: Path, model: str, *options: str, before: tuple[str, ...] = (), **environment: str) -> Job:
    """Such a job from the shard to ``out`` beside it; the command goes behind ``before``."""
    output, log = shard.parent / "out", shard.parent / f"log-{len(list(shard.parent.glob('log-*')))}"
    # What is given again goes before what was given first.
    return Job(
        ["--output", str(output), *given(shard, model), "--write-kept", *options], output, log, before=before, **environment
    )


def check(output: Path, errors: dict[str, str] | None = None, undisturbed: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every id once, and no errors but those whose text begins so; other rows as in ``undisturbed``, as far as it has them.

    Returns the rows by id.
    """
    table = pq.read_table(output).to_pylist()
    assert sorted(row["id"] for row in table) == [f"{i:03d}" for i in range(ROWS)]
    rows = {row["id"]: row for row in table}
    found = {id: row["error"] for id, row in rows.items() if row["error"] is not None}
    assert found.keys() == (errors or {}).keys(), found
    assert all(found[id].startswith(text) for id, text in (errors or {}).items()), found
    assert list((output / ".run/unfinished").glob("*")) == []
    expected = undisturbed or {}
    for id in expected.keys() - found.keys():
        assert rows[id] == expected[id]
    return rows
