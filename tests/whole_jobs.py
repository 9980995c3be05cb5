"""What the tests that hit whole jobs share: their input, and what has to be there in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.soak_job import Job

ROOT = Path(__file__).resolve().parent.parent
ROWS = 48
UNIT = 4


def write_shard(folder: Path, picture: Callable[..., bytes]) -> Path:
    """``ROWS`` rows with images of their own, ids from 000, ``UNIT`` to a row group."""
    table = pa.table(
        {
            "image": [picture(100 + 40 * (i % 4), 80, seed=i) for i in range(ROWS)],
            "question": ["how many"] * ROWS,
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
    return Job(["--output", str(output), *given(shard, model), *options], output, log, before=before, **environment)


def check(output: Path, errors: dict[str, str] | None = None) -> None:
    """Every id once, and no errors but those whose text begins so."""
    rows = pq.read_table(output).to_pylist()
    assert sorted(row["id"] for row in rows) == [f"{i:03d}" for i in range(ROWS)]
    found = {row["id"]: row["error"] for row in rows if row["error"] is not None}
    assert found.keys() == (errors or {}).keys(), found
    assert all(found[id].startswith(text) for id, text in (errors or {}).items()), found
    assert list((output / ".run/unfinished").glob("*")) == []
