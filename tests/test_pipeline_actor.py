from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline import metrics, schema
from pipeline.actor import Answerer
from pipeline.attempts import Attempts
from pipeline.decoder import Decoder
from pipeline.images import Tiler
from pipeline.plan import make_plan
from pipeline.source import UnitReader, block_rows
from trimming.engine import groups

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def answer(
    config: Any,
    table: pa.Table,
    tmp_path: Any,
    engine: Callable[[Any], None] | None = None,
    deaths: Sequence[Sequence[int]] = (),
    **fields: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes ``table`` as a shard and runs its one unit through reader and actor; rows and statistics.

    ``deaths``: which rows (places) were next each time that an actor died over the unit.
    """
    pq.write_table(table, tmp_path / "shard.parquet")
    plan = make_plan(config(**{"input": str(tmp_path / "shard.parquet"), "output": str(tmp_path / "out"), **fields}))
    (unit,) = plan.units
    reports: list[tuple[int, int]] = []
    log = Attempts()
    for rows in deaths:
        log.begin(unit.name)
        log.at(unit.name, rows)
    actor = Answerer(plan.config, plan.columns, plan.checkpoint, lambda rows, errors: reports.append((rows, errors)), log)
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
    assert set(stats["seconds"]) == {"load", "read", "examine", "decode_images", "tower", "prefill", "decode"}
    working = sum(stats["seconds"][stage] for stage in ("tower", "prefill", "decode"))
    assert 0 < stats["cross_kv_byte_seconds"] <= stats["peak_cross_kv_bytes"] * working
    assert stats["cross_kv_byte_seconds"] < stats["cross_kv_byte_seconds_full"]
    assert stats["cross_kv_bytes_read"] > 0


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


def test_each_position_has_its_cluster(config: Any, table: pa.Table, tmp_path: Any) -> None:
    rows, stats = answer(config, table, tmp_path, policy="clusters", keep=0.1, write_kept=True)
    assert stats["errors"] == len(BAD)
    for row in rows:
        if row["error"] is not None or not row["images"]:
            assert row["merged_into"] is None
            continue
        into, grids = row["merged_into"], [g["columns"] * g["rows"] for g in row["tile_grid"]]
        assert len(into) == len(grids) * 4 * 65
        assert [k >= 0 for k in into] == [k // 65 % 4 < grids[k // (4 * 65)] for k in range(len(into))]
        assert sorted(set(into) - {-1}) == row["kept"]
        assert all(into[k] == k for k in row["kept"])
        # Those of another image are others' own.
        assert all(k < 0 or k // (4 * 65) == place // (4 * 65) for place, k in enumerate(into))
        assert row["keep_fraction"] == pytest.approx(0.1, abs=0.01)
    plain, _ = answer(config, table, tmp_path, policy="grid", write_kept=True)
    assert all(row["merged_into"] is None for row in plain)


def test_a_tower_policy_by_name(config: Any, table: pa.Table, tmp_path: Any) -> None:
    """Half of the tower, and behind it what a policy keeps of the features that are left; where each went is written."""
    whole, all_of_it = answer(config, table, tmp_path, policy="none")
    tower = {"tower_policy": "alike", "tower_keep": 0.5, "write_kept": True}
    rows, stats = answer(config, table, tmp_path, policy="none", **tower)
    fewer, _ = answer(config, table, tmp_path, policy="trimmed-llama", k_ratio=0.1, **tower)
    assert stats["errors"] == len(BAD)
    for full, row, less in zip(whole, rows, fewer, strict=True):
        assert row["error"] == full["error"]
        if row["error"] is not None or not full["visual_tokens"]:
            assert row["tower_keep_fraction"] is None
            continue
        assert full["tower_keep_fraction"] == 1.0
        assert row["tower_keep_fraction"] == less["tower_keep_fraction"] == pytest.approx(0.5, abs=0.01)
        assert row["visual_tokens"] == full["visual_tokens"]
        assert less["keep_fraction"] < row["keep_fraction"] < 0.25
        assert row["cross_kv_bytes"] < 0.25 * full["cross_kv_bytes"]
        into = [k for k in row["merged_into"] if k >= 0]
        assert len(into) == row["visual_tokens"]
        assert sorted(set(into)) == row["kept"]
    assert all_of_it["tower_keep_fraction_sum"] == all_of_it["keep_fraction_rows"]
    assert stats["tower_keep_fraction_sum"] == pytest.approx(0.5 * stats["keep_fraction_rows"], rel=0.02)
    with pytest.raises(ValueError, match=r"tower_keep is not to be reached in .*keep=0.1 of the tower: .* is 0.167 of it"):
        answer(config, table, tmp_path, tower_policy="alike", tower_keep=0.1)


def test_a_policy_of_the_family_by_name(config: Any, table: pa.Table, tmp_path: Any) -> None:
    """``snapkv`` keeps its share in every layer and head, ``key_channels`` half of the keys' channels of what is kept."""
    whole, _ = answer(config, table, tmp_path, policy="none")
    rows, stats = answer(config, table, tmp_path, policy="snapkv", keep=0.25, write_kept=True)
    assert stats["errors"] == len(BAD)
    thin, _ = answer(config, table, tmp_path, policy="none", key_channels=0.5)
    thinner, _ = answer(config, table, tmp_path, policy="snapkv", keep=0.25, key_channels=0.5)
    for full, row, sliced, both in zip(whole, rows, thin, thinner, strict=True):
        assert row["error"] == full["error"]
        if row["error"] is not None:
            assert row["kept"] is row["keep_fraction"] is row["cross_kv_bytes"] is None
            continue
        there = full["visual_tokens"]
        assert row["cross_kv_bytes_full"] == full["cross_kv_bytes"]
        if not there:
            assert (row["kept"], row["keep_fraction"], row["cross_kv_bytes"]) == ([], None, 0)
            continue
        assert row["keep_fraction"] == row["kept_visual_tokens"] / there == pytest.approx(0.25, abs=0.01)
        assert row["cross_kv_bytes"] * there == full["cross_kv_bytes"] * row["kept_visual_tokens"]
        # Whatever any layer and head kept.
        assert row["kept_visual_tokens"] < len(row["kept"]) <= there
        assert row["kept"] == sorted(set(row["kept"]))
        assert (sliced["keep_fraction"], both["keep_fraction"]) == (1.0, row["keep_fraction"])
        # Keys and values were as wide.
        assert sliced["cross_kv_bytes"] * 4 == full["cross_kv_bytes"] * 3
        assert both["cross_kv_bytes"] * 4 == row["cross_kv_bytes"] * 3


def test_fewer_tiles(config: Any, table: pa.Table, tmp_path: Any) -> None:
    full, whole = answer(config, table, tmp_path, write_kept=True)
    assert answer(config, table, tmp_path, write_kept=True, max_tiles=4)[0] == full
    rows, _ = answer(config, table, tmp_path, write_kept=True, max_tiles=2)
    # A square is no larger on two tiles than on one.
    assert [r["tiles"] for r in rows if r["error"] is None] == [1, 2, 2, 0, 0, 2, 2, 1]
    assert rows[2]["tile_grid"] == [{"columns": 1, "rows": 1}] * 2
    assert rows[7]["tile_grid"] == [{"columns": 2, "rows": 1}]
    assert rows[8]["tile_grid"] == [{"columns": 1, "rows": 2}]
    # What took no more anyway is answered as before.
    same = [i for i, r in enumerate(full) if r["tiles"] in (None, 0, 1)]
    assert len(same) == 8
    assert [rows[i] for i in same] == [full[i] for i in same]
    rows, stats = answer(config, table, tmp_path, max_tiles=1)
    assert all(r["tiles"] == r["images"] for r in rows if r["error"] is None)
    assert stats["tiles"] == stats["images"] == whole["images"]
    assert stats["cross_kv_bytes_full"] == whole["cross_kv_bytes_full"] * stats["tiles"] / whole["tiles"]
    assert [r["prompt_tokens"] for r in rows] == [r["prompt_tokens"] for r in full]


def test_a_processor_of_more_tiles_than_the_model_takes_is_refused(
    config: Any, table: pa.Table, tmp_path: Any, checkpoint_folder: str
) -> None:
    shutil.copytree(checkpoint_folder, tmp_path / "model")
    file = tmp_path / "model/processor_config.json"
    said = json.loads(file.read_text())
    said["image_processor"]["max_image_tiles"] = 6
    file.write_text(json.dumps(said))
    assert answer(config, table, tmp_path, model=str(tmp_path / "model"), max_tiles=4)[1]["errors"] == len(BAD)
    before = threading.active_count()
    pq.write_table(table, tmp_path / "shard.parquet")
    plan = make_plan(config(input=str(tmp_path / "shard.parquet"), output=str(tmp_path / "out"), model=str(tmp_path / "model")))
    actor = Answerer(plan.config, plan.columns, plan.checkpoint)
    with pytest.raises(RuntimeError, match=r"can't be loaded: ValueError: max_tiles=6 is not in 1 to 4"):
        actor(pa.table({}))
    del actor
    gc.collect()
    assert threading.active_count() <= before


def test_a_model_that_was_saved_over_since_planning_is_refused(
    config: Any, table: pa.Table, tmp_path: Any, checkpoint_folder: str
) -> None:
    """Or another machine's folder of the same name: an actor answers with the model that the run says."""
    shutil.copytree(checkpoint_folder, tmp_path / "model")
    pq.write_table(table, tmp_path / "shard.parquet")
    plan = make_plan(config(input=str(tmp_path / "shard.parquet"), output=str(tmp_path / "out"), model=str(tmp_path / "model")))
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("user", "USER").replace("message['role']", "'somebody'"))
    actor = Answerer(plan.config, plan.columns, plan.checkpoint)
    with pytest.raises(RuntimeError, match=r"is not the one that this run began with; changed: chat_template\.jinja"):
        actor(pa.table({}))


def test_captions(config: Any, table: pa.Table, tmp_path: Any) -> None:
    rows, stats = answer(
        config, table.drop(["question"]), tmp_path, job="caption", prompt="Describe this image.", question_column=None
    )
    assert "no image to caption" in rows[3]["error"]
    assert rows[9]["error"] is None
    assert stats["errors"] == 5


def test_only_the_culprit_of_a_failed_batch_fails(config: Any, table: pa.Table, tmp_path: Any) -> None:
    def spoil(engine: Any) -> None:
        encode, odd = engine.batch.tower.encode, Tiler(engine.processor).grids.index((3, 1)) + 1

        def spoiled(pictures: Any) -> Any:
            # The image of three tiles, one above the other.
            if any(picture.ratio_id == odd for picture in pictures):
                raise RuntimeError("an odd row\nof two lines")
            return encode(pictures)

        engine.batch.tower.encode = spoiled

    expected, _ = answer(config, table, tmp_path)
    rows, stats = answer(config, table, tmp_path, engine=spoil)
    assert rows[8]["error"] == "RuntimeError: an odd row of two lines"
    assert [r for i, r in enumerate(rows) if i != 8] == [r for i, r in enumerate(expected) if i != 8]
    assert stats["errors"] == 5


def test_out_of_memory_changes_no_answer(config: Any, table: pa.Table, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    from torch import OutOfMemoryError

    calls: list[int] = []

    def spoil(engine: Any) -> None:
        prefill = engine.batch.prefill

        def spoiled(sequences: Any) -> Any:
            calls.append(len(sequences))
            if len(sequences) > 1:
                raise OutOfMemoryError("out of memory")
            return prefill(sequences)

        engine.batch.prefill = spoiled

    expected, _ = answer(config, table, tmp_path)
    assert answer(config, table, tmp_path, engine=spoil)[0] == expected
    # Which rows come together is a matter of timing; once two are too many, one at a time is left.
    assert calls[-1] == 1
    assert caplog.text.count("out of memory") == (max(calls) > 1)


def test_a_lost_device_ends_the_unit(config: Any, table: pa.Table, tmp_path: Any) -> None:
    def spoil(engine: Any) -> None:
        def fail(sequences: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        engine.batch.prefill = fail
        engine.batch._healthy = lambda: False

    with pytest.raises(RuntimeError, match="device-side assert"):
        answer(config, table, tmp_path, engine=spoil)


def test_equal_images_are_decoded_and_encoded_once(
    config: Any, picture: Callable[..., bytes], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    decode = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, data: decoded.append(data) or decode(self, data))
    files = [picture(300, 80, seed=i) for i in range(3)]
    questions = ["how many", "what is this", "what is this how many"]
    table = pa.table({"image": [f for f in files for _ in questions], "question": questions * 3, "id": list("abcdefghi")})
    rows, stats = answer(config, table, tmp_path)
    assert sorted(decoded) == sorted(files)
    assert (stats["images_encoded"], stats["image_hits"], stats["images"]) == (3, 6, 9)
    assert 1 <= stats["peak_sequences"] <= 9
    assert 0 < stats["peak_cross_kv_bytes"] <= stats["peak_kv_bytes"]
    apart, stats = answer(config, table, tmp_path, image_cache_gib=0.0)
    assert apart == rows
    # What decides together needs no cache.
    assert (stats["images_encoded"], stats["image_hits"]) == (3, 6)
    _, stats = answer(config, table, tmp_path, image_cache_gib=0.0, kept_sets="question")
    assert (stats["images_encoded"], stats["image_hits"]) == (9, 0)


QUESTIONS = ["how many", "what is this", "describe this image.", "what is this image", "how is this many"]


@pytest.fixture
def about_images(picture: Callable[..., bytes]) -> pa.Table:
    """Five questions about each of six images of one to three tiles, and five without an image; ids tell image and question."""
    files = [picture(100 + 120 * (i % 3), 80, seed=i) for i in range(6)]
    asked = [(i, q) for i in range(7) for q in range(len(QUESTIONS))]
    return pa.table(
        {
            "image": pa.array([files[i] if i < 6 else None for i, _ in asked], pa.binary()),
            "question": [QUESTIONS[q] for _, q in asked],
            "id": [f"{i}/{q}" for i, q in asked],
        }
    )


def interleaved(table: pa.Table) -> pa.Table:
    """Rows of one image as far apart as they can be."""
    return table.take([row for first in range(len(QUESTIONS)) for row in range(first, len(table), len(QUESTIONS))])


def said(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What must not depend on anything but the rows, by id."""
    return {row["id"]: (row["text"], row["output_tokens"], row["kept"], row["error"]) for row in rows}


def kept(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """The kept positions of each image's rows."""
    found: dict[str, list[list[int]]] = {}
    for row in rows:
        if row["images"] and row["error"] is None:
            found.setdefault(row["image_digest"], []).append(row["kept"])
    return found


@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_answers_and_kept_sets_depend_on_the_rows_alone(
    config: Any, about_images: pa.Table, tmp_path: Any, kept_sets: str
) -> None:
    fields = {"kept_sets": kept_sets, "write_kept": True, "max_new_tokens": 12}
    rows, stats = answer(config, about_images, tmp_path, **fields)
    assert stats["errors"] == 0
    assert len({row["text"] for row in rows}) > 10
    # Rows of an image need not be neighbours, nor decode at once, and memory may be short of what all of them take.
    apart, _ = answer(config, interleaved(about_images), tmp_path, **fields)
    assert [row["id"] for row in apart] == interleaved(about_images)["id"].to_pylist()
    assert said(apart) == said(rows)
    for batch_size in (1, 4):
        assert answer(config, about_images, tmp_path, batch_size=batch_size, **fields)[0] == rows
    short, some = answer(config, about_images, tmp_path, kv_gib=stats["peak_kv_bytes"] / 3 / 2**30, **fields)
    assert short == rows
    assert some["peak_kv_bytes"] < stats["peak_kv_bytes"] / 2
    # Two actors have died; now one group at a time is answered.
    assert answer(config, interleaved(about_images), tmp_path, deaths=[(), ()], **fields)[0] == apart
    for sets in kept(rows).values():
        assert len(sets) == len(QUESTIONS)
        assert (len(set(map(tuple, sets))) == 1) is (kept_sets == "image")


def test_a_question_alone_decides_as_one_that_decides_for_itself(config: Any, about_images: pa.Table, tmp_path: Any) -> None:
    rows, _ = answer(config, about_images, tmp_path, write_kept=True, kept_sets="question")
    for kept_sets in ("image", "question"):
        alone, _ = answer(config, about_images.slice(7, 1), tmp_path, write_kept=True, kept_sets=kept_sets)
        assert alone == [rows[7]]


def test_more_rows_about_an_image_than_decide_together(config: Any, picture: Callable[..., bytes], tmp_path: Any) -> None:
    """Of two units side by side; a group of each is more than an actor of ``batch_size=1`` takes ahead."""
    words = ["how", "many", "what", "is", "this", "image"]
    asked = [f"{a} {b} {c}" for a in words for b in words for c in words][:140]
    table = pa.table({"image": [picture(seed=3)] * 140, "question": asked, "id": [f"{i:03d}" for i in range(140)]})
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=70)
    settings = {"input": str(tmp_path / "shard.parquet"), "output": str(tmp_path / "out"), "unit_rows": 70}
    found: list[list[dict[str, Any]]] = []
    for batch_size in (1, 256):
        plan = make_plan(config(**settings, batch_size=batch_size, write_kept=True))
        actor = Answerer(plan.config, plan.columns, plan.checkpoint)
        blocks = [block for unit in plan.units for block in UnitReader(plan.input, plan.columns)(unit)]
        with ThreadPoolExecutor(2) as pool:
            units = [rows.to_pylist() for out in pool.map(actor, blocks) for _, rows, _ in block_rows([out])]
        for rows in units:
            assert [row["error"] for row in rows] == [None] * 70
            parts = groups([[row["image_digest"]] for row in rows], [row["prompt_tokens"] for row in rows])
            assert [len(part) for part in parts] == [35, 35]
            assert all(rows[place]["kept"] == rows[part[0]]["kept"] for part in parts for place in part)
        found.append([row for rows in units for row in rows])
    assert found[0] == found[1]


def test_an_image_that_cannot_be_decoded_fails_its_rows_alone(config: Any, about_images: pa.Table, tmp_path: Any) -> None:
    rows, _ = answer(config, interleaved(about_images), tmp_path, write_kept=True)
    whole = about_images["image"][5].as_py()
    cells = [cell[:-40] if cell == whole else cell for cell in about_images["image"].to_pylist()]
    broken = about_images.set_column(0, "image", pa.array(cells, pa.binary()))
    found, stats = answer(config, interleaved(broken), tmp_path, write_kept=True)
    assert stats["errors"] == len(QUESTIONS)
    for row, before in zip(found, rows, strict=True):
        if row["id"].startswith("1/"):
            assert "can't be decoded" in row["error"]
        else:
            assert row == before
    assert len({row["error"] for row in found}) == 2


def test_a_prompt_that_cannot_be_run_fails_alone(
    config: Any, about_images: pa.Table, tmp_path: Any, checkpoint_folder: str
) -> None:
    """Its tokenizer knows a word that the model has no embedding for; the image's other rows decide together without it."""
    shutil.copytree(checkpoint_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens([f"unheard{i}" for i in range(8)])
    tokenizer.save_pretrained(tmp_path / "model")
    questions = about_images["question"].to_pylist()
    fields = {"model": str(tmp_path / "model"), "write_kept": True}
    kept_back = [place for place in range(len(about_images)) if place != 7]
    rows, stats = answer(config, about_images.take(kept_back), tmp_path, **fields)
    assert stats["errors"] == 0
    questions[7] = "how many unheard7"
    found, stats = answer(config, about_images.set_column(1, "question", [questions]), tmp_path, **fields)
    assert "has a token outside of the vocabulary" in found[7]["error"]
    assert stats["errors"] == 1
    assert [found[place] for place in kept_back] == rows


def test_rows_that_kill_their_actor_are_left_out(config: Any, about_images: pa.Table, tmp_path: Any) -> None:
    """A question met as it was examined; a group as it was answered, whole."""
    table = interleaved(about_images)
    place = {id: number for number, id in enumerate(table["id"].to_pylist())}
    group = [place[f"2/{question}"] for question in range(len(QUESTIONS))]
    fields: dict[str, Any] = {"write_kept": True, "kept_sets": "image"}
    rows, _ = answer(config, table, tmp_path, **fields)
    for deaths, lethal in (([(), (), group, group], group), ([(), (), [place["4/1"]], [place["4/1"]]], [place["4/1"]])):
        found, stats = answer(config, table, tmp_path, deaths=deaths, **fields)
        assert [n for n, row in enumerate(found) if row["error"] is not None] == sorted(lethal)
        assert all(row["error"].startswith("left out, as the actor died each time") for row in found if row["error"])
        assert stats["errors"] == len(lethal)
        # Its image's other rows decide without a row that is left out, as they do where it was never there.
        others = table.take([n for n in range(len(table)) if n not in lethal])
        assert [row for row in found if row["error"] is None] == answer(config, others, tmp_path, **fields)[0]
        same = [n for n, row in enumerate(found) if row["error"] is None and not row["id"].startswith("4/")]
        assert [found[n] for n in same] == [rows[n] for n in same]


def test_units_side_by_side_share_one_engine(config: Any, picture: Callable[..., bytes], tmp_path: Any) -> None:
    """Ray calls an actor from two threads: both units come out whole, and their seconds add up to the engine's."""
    table = pa.table({"image": [picture(seed=i) for i in range(40)], "question": ["how many"] * 40, "n": range(40)})
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=20)
    settings = {"input": str(tmp_path / "shard.parquet"), "output": str(tmp_path / "out"), "unit_rows": 20}
    plan = make_plan(config(**settings, max_new_tokens=30))
    actor = Answerer(plan.config, plan.columns, plan.checkpoint)
    ready = actor.unit_ended
    blocks = [block for unit in plan.units for block in UnitReader(plan.input, plan.columns)(unit)]
    # As where reading is slow: the actor is held and waits.
    time.sleep(0.2)
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(actor, blocks))
    ended = time.perf_counter()
    numbers, stats = [], []
    for out in outs:
        ((_, rows, whole),) = block_rows([out])
        numbers += [row["n"] for row in rows.to_pylist() if row["error"] is None]
        stats.append(json.loads(whole[schema.STATS][0].as_py()))
    assert numbers == list(range(40))
    assert max(s["peak_sequences"] for s in stats) > 20
    engine = actor.engine.batch
    for stage in ("tower", "prefill", "decode"):
        assert sum(s["seconds"].get(stage, 0) for s in stats) == pytest.approx(engine.seconds[stage])
    assert sum(s["decode_tokens"] for s in stats) == engine.statistics.decode_tokens
    assert sum(s["images_encoded"] for s in stats) == 40
    # Both units took most of that time, and it counts once.
    assert all(s["actor_seconds"] >= 0 for s in stats)
    assert sum(s["actor_seconds"] for s in stats) == pytest.approx(actor.unit_ended - ready)
    assert 0.2 < actor.unit_ended - ready <= ended - ready
    # A third unit, after a pause, stands for the pause too, and the model is loaded but once.
    time.sleep(0.2)
    ((_, _, whole),) = block_rows([actor(blocks[0])])
    third = json.loads(whole[schema.STATS][0].as_py())
    assert third["actor_seconds"] > 0.2
    assert sum(s["actor_seconds"] for s in [*stats, third]) == pytest.approx(actor.unit_ended - ready)
    assert ["load" in s["seconds"] for s in [*stats, third]].count(True) == 1
    assert third["gpus"] == 0


def test_an_actor_that_goes_ends_its_thread(config: Any, table: pa.Table, tmp_path: Any) -> None:
    pq.write_table(table, tmp_path / "shard.parquet")
    plan = make_plan(config(input=str(tmp_path / "shard.parquet"), output=str(tmp_path / "out")))
    actor = Answerer(plan.config, plan.columns, plan.checkpoint)
    (thread,) = [t for t in threading.enumerate() if t is actor.device._thread]
    del actor
    gc.collect()
    assert not thread.is_alive()


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
    # Their own, as that column can be read.
    assert [r["id"] for r in rows] == ["c", "d"]
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
