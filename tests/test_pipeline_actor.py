from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import metrics, schema
from pipeline.actor import Answerer
from pipeline.plan import make_plan
from pipeline.source import UnitReader, block_rows

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def answer(
    config: Any, table: pa.Table, tmp_path: Any, engine: Callable[[Any], None] | None = None, **fields: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes ``table`` as a shard and runs its one unit through reader and actor; rows and statistics."""
    pq.write_table(table, tmp_path / "shard.parquet")
    plan = make_plan(config(**{"input": str(tmp_path / "shard.parquet"), "output": str(tmp_path / "out"), **fields}))
    (unit,) = plan.units
    reports: list[tuple[int, int]] = []
    actor = Answerer(plan.config, plan.columns, plan.checkpoint, lambda rows, errors: reports.append((rows, errors)))
    if engine:
        engine(actor.engine)
    (block,) = UnitReader(plan.input, plan.columns)(unit)
    out = actor(block)
    ((name, rows, whole),) = block_rows([out])
    assert name == unit.name
    assert rows.type == pa.struct(list(plan.columns.output(plan.config.write_kept)))
    assert sum(r for r, _ in reports) == len(rows)
    stats = json.loads(whole[schema.STATS][0].as_py())
    assert sum(e for _, e in reports) == stats["errors"]
    return rows.to_pylist(), stats


@pytest.fixture
def table(picture: Callable[..., bytes]) -> pa.Table:
    """Twelve rows: images of 1 to 4 tiles, rows of two images and of none, and four that can't be answered."""
    cells: list[Any] = [
        [picture(100, 80)],
        [picture(300, 80, seed=1, format="JPEG")],
        [picture(230, 230, seed=2), picture(50, 50, seed=3)],
        [],
        None,
        [b"broken"],
        [picture(100, 80)[:-40]],
        [picture(330, 100, seed=4)],
        [picture(90, 330, seed=5)],
        [picture(100, 80, seed=6)],
        [picture(100, 80, seed=6), None],
        [picture(100, 100, seed=7)],
    ]
    return pa.table(
        {
            "image": pa.array(
                [None if c is None else [{"bytes": b, "path": None} if b else None for b in c] for c in cells], pa.list_(IMAGE)
            ),
            "question": ["how many"] * 9 + [None, "how many", "what is this"],
            "answer": ["a"] * 11 + [None],
            "n": range(12),
        }
    )


BAD = {5: "not an image", 6: "can't be decoded", 9: "no question", 10: "image 2 of 2 is null"}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_row_comes_out_in_order(config: Any, table: pa.Table, tmp_path: Any, batch_size: int) -> None:
    rows, stats = answer(config, table, tmp_path, batch_size=batch_size)
    assert [r["n"] for r in rows] == list(range(12))
    assert len({r["id"] for r in rows}) == 12
    for i, row in enumerate(rows):
        assert row["question"] == table["question"][i].as_py()
        if i in BAD:
            assert BAD[i] in row["error"]
            assert row["finish_reason"] == "error"
            assert row["text"] is row["tiles"] is row["keep_fraction"] is row["prompt_tokens"] is row["cross_kv_bytes"] is None
        else:
            assert row["error"] is None
            assert isinstance(row["text"], str)
            assert "<|" not in row["text"]
            assert row["prompt_tokens"] > 0
            assert row["output_tokens"] > 0
    assert [r["images"] for r in rows] == [1, 1, 2, 0, 0, 1, 1, 1, 1, 1, 2, 1]
    assert [r["tiles"] for r in rows if r["error"] is None] == [1, 3, 5, 0, 0, 3, 3, 1]
    assert [r["visual_tokens"] for r in rows if r["error"] is None] == [65 * t for t in (1, 3, 5, 0, 0, 3, 3, 1)]
    assert rows[3]["keep_fraction"] is rows[3]["image_digest"] is None
    assert rows[3]["cross_kv_bytes_full"] == 0
    assert rows[9]["image_digest"]
    assert (stats["rows"], stats["errors"], stats["judged"]) == (12, 4, 11)
    assert stats["images"] == 7
    assert stats["keep_fraction_rows"] == 6
    assert set(stats["seconds"]) == {"load", "read", "examine", "decode", "inputs", "prefill", "generation"}


def test_batches_equal_single_rows(config: Any, table: pa.Table, tmp_path: Any) -> None:
    alone, _ = answer(config, table, tmp_path, batch_size=1)
    assert answer(config, table, tmp_path, batch_size=32)[0] == alone
    assert (
        answer(config, table, tmp_path, batch_size=4, rows="transformers")[0]
        == answer(config, table, tmp_path, batch_size=1, rows="transformers")[0]
    )


def test_kept_positions_and_grids(config: Any, table: pa.Table, tmp_path: Any) -> None:
    rows, _ = answer(config, table, tmp_path, write_kept=True)
    assert rows[2]["tile_grid"] == [{"columns": 2, "rows": 2}, {"columns": 1, "rows": 1}]
    assert rows[7]["tile_grid"] == [{"columns": 3, "rows": 1}]
    assert rows[8]["tile_grid"] == [{"columns": 1, "rows": 3}]
    assert rows[3]["tile_grid"] == rows[3]["kept"] == []
    assert rows[5]["tile_grid"] is rows[5]["kept"] is None
    for row in rows:
        if row["error"] is None:
            assert len(row["kept"]) == row["kept_visual_tokens"]
            assert row["kept"] == sorted(set(row["kept"]))
            # Each image has 4 places for tiles; padding tiles are never kept.
            grids = [g["columns"] * g["rows"] for g in row["tile_grid"]]
            assert all(k // 65 % 4 < grids[k // (4 * 65)] for k in row["kept"])


def test_captions(config: Any, table: pa.Table, tmp_path: Any) -> None:
    rows, stats = answer(
        config, table.drop(["question"]), tmp_path, job="caption", prompt="Describe this image.", question_column=None
    )
    assert "no image to caption" in rows[3]["error"]
    assert rows[9]["error"] is None
    assert stats["errors"] == 5


def test_only_the_culprit_of_a_failed_batch_fails(config: Any, table: pa.Table, tmp_path: Any) -> None:
    calls: list[int] = []

    def spoil(engine: Any) -> None:
        generate = engine.generate

        def spoiled(prompts: Any) -> Any:
            calls.append(len(prompts))
            if any(len(p.images) == 1 and len(p.images[0].pixels) == 3 and p.images[0].grid == (3, 1) for p in prompts):
                raise RuntimeError("an odd row\nof two lines")
            return generate(prompts)

        engine.generate = spoiled

    expected, _ = answer(config, table, tmp_path)
    rows, stats = answer(config, table, tmp_path, engine=spoil)
    assert rows[8]["error"] == "RuntimeError: an odd row of two lines"
    assert [r for i, r in enumerate(rows) if i != 8] == [r for i, r in enumerate(expected) if i != 8]
    assert stats["errors"] == 5
    assert calls == [1, 5, 1, 1, 1, 1, 1, 2]


def test_out_of_memory_halves_the_batch(config: Any, table: pa.Table, tmp_path: Any) -> None:
    from torch import OutOfMemoryError

    calls: list[int] = []

    def spoil(engine: Any) -> None:
        generate = engine.generate

        def spoiled(prompts: Any) -> Any:
            calls.append(len(prompts))
            if len(prompts) > 2:
                raise OutOfMemoryError("out of memory")
            return generate(prompts)

        engine.generate = spoiled

    expected, _ = answer(config, table, tmp_path)
    assert answer(config, table, tmp_path, engine=spoil)[0] == expected
    assert calls == [1, 5, 3, 2, 1, 2, 2]


def test_a_lost_device_ends_the_unit(config: Any, table: pa.Table, tmp_path: Any) -> None:
    def spoil(engine: Any) -> None:
        def fail(prompts: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        engine.generate = fail
        engine.healthy = lambda: False

    with pytest.raises(RuntimeError, match="device-side assert"):
        answer(config, table, tmp_path, engine=spoil)


def test_long_questions_are_errors(config: Any, tmp_path: Any) -> None:
    table = pa.table({"image": pa.nulls(2, pa.binary()), "question": ["how many " * 600, "how many"]})
    rows, _ = answer(config, table, tmp_path)
    assert "room for" in rows[0]["error"]
    assert rows[1]["error"] is None


def test_a_shard_of_one_column(config: Any, picture: Callable[..., bytes], tmp_path: Any) -> None:
    table = pa.table({"image": [picture(), b"broken"]})
    rows, _ = answer(config, table, tmp_path, job="caption", prompt="how many", question_column=None)
    assert [r["error"] is None for r in rows] == [True, False]


def test_a_damaged_row_group_becomes_error_rows(config: Any, picture: Callable[..., bytes], tmp_path: Any) -> None:
    path = tmp_path / "shard.parquet"
    table = pa.table({"image": [picture(seed=i) for i in range(4)], "question": ["how many"] * 4, "id": list("abcd")})
    pq.write_table(table, path, row_group_size=2)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    raw = bytearray(path.read_bytes())
    raw[place : place + 300] = b"\xff" * 300
    path.write_bytes(raw)
    plan = make_plan(config(input=str(path), output=str(tmp_path / "out"), unit_rows=2))
    good, bad = ((b,) for (b,) in (UnitReader(plan.input, plan.columns)(u) for u in plan.units))
    assert [r["id"] for r in good[0]["rows"][0].as_py()] == ["a", "b"]
    rows = bad[0]["rows"][0].as_py()
    assert len(rows) == 2
    assert all("shard.parquet, rows 2 to 4" in r["images"][0]["error"] for r in rows)


@pytest.mark.parametrize(
    ("text", "truth", "same"),
    [
        ("Red.", "red", True),
        (" a  red, circle", "A red circle", True),
        ("red", "blue", False),
        ("3", 3, True),
        ("red", ["blue", "Red"], True),
        (None, "red", False),
        ("", "red", False),
    ],
)
def test_accuracy(text: str | None, truth: object, same: bool) -> None:
    assert metrics.exact(text, truth) is same
