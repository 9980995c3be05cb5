"""Rows that differ, shown: where a kept feature lies on an image, and images read again from a run's input."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from run_folders import write_run

from jobs.comparison.examples import Example, load
from jobs.comparison.overlay import Geometry
from jobs.comparison.runs import Run, read_runs
from jobs.comparison.shelf import MOST_PIXELS
from pipeline import record, schema
from pipeline.actor import Answerer
from pipeline.plan import make_plan
from pipeline.sink import UnitWriter
from pipeline.source import UnitReader, block_rows

TINY = Geometry(side=112, patch=14, most_tiles=4)
"""The geometry of the tiny checkpoint, as of the demo's model."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def image_processor() -> Any:
    from demo.architecture import build_processor

    return build_processor([]).image_processor


@pytest.mark.parametrize(
    ("size", "grid"),
    [((100, 97), (1, 1)), ((220, 100), (1, 2)), ((104, 330), (3, 1)), ((210, 200), (2, 2)), ((640, 80), (1, 4))],
)
def test_boxes_lie_where_the_processor_puts_the_pixels(
    image_processor: Any, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """A dark spot in the middle of a patch's box makes that patch, and no other, the darkest of the processor's tiles."""
    looked = 0
    for position in range(0, grid[0] * grid[1] * TINY.tokens, 13):
        box = TINY.box(position, grid, size)
        if box is None or box[2] > size[0] or box[3] > size[1]:
            continue
        looked += 1
        image = Image.new("RGB", size, (255, 255, 255))
        left, top, right, bottom = box
        image.paste((0, 0, 0), (round(left + 4), round(top + 4), round(right - 4), round(bottom - 4)))
        out = image_processor([[image]], return_tensors="np", do_normalize=False)
        assert out["num_tiles"][0][0] == grid[0] * grid[1]
        # Padding is black too: count only what differs from the same picture without the spot.
        plain = image_processor([[Image.new("RGB", size, (255, 255, 255))]], return_tensors="np", do_normalize=False)
        spot = (plain["pixel_values"] - out["pixel_values"])[0, 0].sum(1)
        patches = spot.reshape(4, TINY.per_side, 14, TINY.per_side, 14).sum((2, 4)).reshape(4, -1)
        tile, patch = np.unravel_index(patches.argmax(), patches.shape)
        assert tile * TINY.tokens + 1 + patch == position
    assert looked


def test_boxes_tile_the_canvas_once() -> None:
    boxes = [TINY.box(p, (2, 2), (224, 224)) for p in range(4 * TINY.tokens)]
    assert boxes.count(None) == 4, "class tokens are nowhere"
    assert {box[:2] for box in boxes if box} == set(itertools.product(range(0, 224, 14), repeat=2))


def test_the_veil_covers_exactly_the_dropped_patches_of_a_shrunk_image() -> None:
    shown = Image.new("RGB", (80, 80), (255, 255, 255))
    # The image was 160 pixels wide: five of its pixels are a patch of 14 after the processor's enlargement.
    kept = [token for token in range(TINY.tokens) if token % 2]
    veiled = np.array(TINY.veil(shown, (160, 160), kept, (1, 1)))[:, :, 0] < 200
    expected = np.zeros((8, 8), bool).reshape(-1)
    expected[[token - 1 for token in range(1, TINY.tokens) if token not in kept]] = True
    assert (veiled == expected.reshape(8, 8).repeat(10, 0).repeat(10, 1)).all()
    assert (np.array(TINY.veil(shown, (160, 160), [], (1, 1)))[..., 0] < 200).all(), "no seam between veiled patches"


def test_regions_have_a_colour_each_and_lines_between() -> None:
    """The left half of the patches is one feature, the right half another, but for one that went."""
    shown = Image.new("RGB", (160, 160), (255, 255, 255))
    into = [0, *(1 if (token - 1) % 8 < 4 else 5 for token in range(1, TINY.tokens))]
    into[TINY.tokens - 1] = -1
    drawn = np.array(TINY.regions(shown, (160, 160), into, (1, 1)))
    # Patches have 20 pixels here: their middles.
    middles = drawn[10::20, 10::20]
    colours = [{tuple(colour) for colour in half.reshape(-1, 3)} for half in (middles[:, :4], middles[:-1, 4:])]
    assert [len(each) for each in colours] == [1, 1]
    assert colours[0] != colours[1]
    assert middles[-1, -1].max() < 120, "what went is veiled"
    edges = drawn.min(-1) > 230
    assert edges[:140, 80].all()
    assert not edges[:140, 20].any()


def test_positions_of_a_second_image_count_from_its_own_first() -> None:
    stride = 4 * TINY.tokens
    assert TINY.of_image([0, 7, stride, stride + 3, 2 * stride], 1) == [0, 3]
    into = [0] * stride + [stride, stride + 2, -1] + [-1] * (stride - 3)
    assert TINY.merged_in_image(into, 1) == [0, 2, -1] + [-1] * (stride - 3)
    assert TINY.merged_in_image(into, 0) == [0] * stride


@pytest.mark.parametrize("config", [{}, {"vision_config": {"image_size": 112}}, {"vision_config": None}])
def test_a_model_that_does_not_say_how_it_cuts_images(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not say"):
        Geometry.of(config)


def _plain(number: int) -> bytes:
    """The image of row ``number``: of a size and a light colour of its own."""
    out = io.BytesIO()
    Image.new("RGB", (100 + 20 * number, 80 + 9 * number), (255 - 8 * number, 135 + 8 * number, 200)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, config: Callable[..., Any], picture: Callable[..., bytes]
) -> Callable[..., Path]:
    """Runs the tiny model over ``shards/`` into a run folder, without Ray: ``made(name, **fields of RunConfig)``.

    The shards: two, of four row groups each, with ids r0 to r15. Row r1 has two images, r2 none, r3 a large one.
    """
    root = tmp_path_factory.mktemp("made")
    (root / "shards/deep").mkdir(parents=True)
    cells = [[_plain(i)] for i in range(16)]
    cells[1] = [picture(230, 230, seed=40), picture(60, 50, seed=41)]
    cells[2] = []
    cells[3] = [picture(1200, 700, seed=42, format="JPEG")]
    for name, start in (("one.parquet", 0), ("deep/two.parquet", 8)):
        rows = range(start, start + 8)
        table = pa.table(
            {
                "photo": pa.array([[{"bytes": b, "path": None} for b in cells[i]] for i in rows], pa.list_(IMAGE)),
                "question": ["how many" if i % 2 else "what is this" for i in rows],
                "answer": [f"answer {i}" for i in rows],
                "id": [f"r{i}" for i in rows],
            }
        )
        pq.write_table(table, root / "shards" / name, row_group_size=2)

    def make(name: str, **fields: Any) -> Path:
        given = {"input": str(root / "shards"), "output": str(root / name), "image_column": "photo", "unit_rows": 4, **fields}
        plan = make_plan(config(**given))
        actor = Answerer(plan.config, plan.columns, plan.checkpoint)
        writer = UnitWriter(plan.output, plan.columns.output(plan.config.write_kept))
        record.begin(plan.output, plan.record())
        for unit in plan.units:
            (block,) = UnitReader(plan.input, plan.columns)(unit)
            ((_, rows, whole),) = block_rows([actor(block)])
            writer(unit.name, rows, json.loads(whole[schema.STATS][0].as_py()))
        return root / name

    return make


@pytest.fixture(scope="module")
def pair(made: Callable[..., Path]) -> list[Run]:
    full = made("full", policy="none", write_kept=True)
    trimmed = made("trimmed", policy="trimmed-llama", k_ratio=0.1, write_kept=True)
    return read_runs([f"trimmed={trimmed}"], f"full={full}", {})


def examples(runs: list[Run], *ids: str, **options: Any) -> list[Example]:
    given = {"input": None, "storage_options": {}, **options}
    return load({runs[1].name: list(ids)}, runs[0], runs, **given)[runs[1].name]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def rows_of(run: Run) -> dict[str, Any]:
    table = pq.read_table(run.folder.url)
    return {row["id"]: row for row in table.to_pylist()}


def test_each_row_comes_with_its_own_image_and_the_veil_of_each_run(pair: list[Run]) -> None:
    found = {example.id: example for example in examples(pair, "r9", "r4", "r15")}
    assert list(found) == ["r9", "r4", "r15"]
    for number in (9, 4, 15):
        example, trimmed = found[f"r{number}"], rows_of(pair[1])[f"r{number}"]
        assert example.question == ("how many" if number % 2 else "what is this")
        assert example.references == (f"answer {number}",)
        full, other = example.sides
        assert (full.why, other.why) == ([], [])
        assert other.text == trimmed["text"]
        assert full.keep_fraction == 1
        assert other.keep_fraction == trimmed["keep_fraction"] < 1
        original = opened(_plain(number))
        assert np.abs(np.array(opened(full.pictures[0]), float) - np.array(original, float)).max() < 6, "another row's image"
        # Which patches are veiled is what the row says.
        shown, (grid,) = np.array(opened(other.pictures[0])), trimmed["tile_grid"]
        looked = set()
        for position in range(trimmed["visual_tokens"]):
            box = TINY.box(position, (grid["rows"], grid["columns"]), original.size)
            if box and box[2] <= original.width and box[3] <= original.height:
                x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
                kept = position in trimmed["kept"]
                looked.add(kept)
                # The veil is dark, and the images are not.
                assert (shown[y, x].sum() > 450) == kept, (number, position)
        assert looked == {True, False}


def test_several_images_a_large_one_and_none(pair: list[Run]) -> None:
    two, none, large = examples(pair, "r1", "r2", "r3")
    assert [opened(data).size for data in two.sides[1].pictures] == [(230, 230), (60, 50)]
    assert two.sides[0].pictures[1] != two.sides[1].pictures[1], "the second image has a veil of its own"
    assert none.sides[1].pictures == []
    assert none.sides[1].why == ["a row without an image"]
    assert max(opened(large.sides[0].pictures[0]).size) == MOST_PIXELS


def test_units_that_a_limit_cuts_short_are_found_again(made: Callable[..., Path]) -> None:
    runs = read_runs([f"a={made('limited-k', k_ratio=0.1, limit=11)}"], f"b={made('limited', policy='none', limit=11)}", {})
    ids = sorted(rows_of(runs[0]))
    assert len(ids) == 11
    for example in examples(runs, *ids):
        assert len(example.sides[0].pictures) == (0 if example.id == "r2" else 2 if example.id == "r1" else 1), example


def test_without_kept_positions_the_image_is_shown_bare(made: Callable[..., Path], pair: list[Run]) -> None:
    bare = made("bare", policy="trimmed-llama", k_ratio=0.1)
    (example,) = examples(read_runs([f"bare={bare}"], f"full={pair[0].folder.url}", {}), "r5")
    assert example.sides[1].why == ["kept features not recorded: the run was made without --write-kept"]
    assert example.sides[1].pictures == example.sides[0].pictures


def test_an_input_that_moved_has_changed_or_is_gone(pair: list[Run], tmp_path: Path) -> None:
    here = Path(str(pair[0].config["input"]))
    away = tmp_path / "moved"
    shutil.copytree(here, away)
    (example,) = examples(pair, "r6", input=str(away))
    assert len(example.sides[0].pictures) == 1

    table = pq.read_table(away / "one.parquet")
    changed = pa.array([[{"bytes": _plain(15), "path": None}]] * 8, pa.list_(IMAGE))
    pq.write_table(table.set_column(0, "photo", changed), away / "one.parquet", row_group_size=2)
    (example,) = examples(pair, "r6", input=str(away))
    assert example.sides[0].pictures == []
    assert "another one now" in example.sides[0].why[0]
    assert example.sides[0].text == rows_of(pair[0])["r6"]["text"], "the row is shown all the same"

    (away / "one.parquet").unlink()
    (example,) = examples(pair, "r6", input=str(away))
    assert "no shard there" in example.sides[0].why[0]
    (example,) = examples(pair, "r6", input=str(tmp_path / "nowhere"))
    assert "does not exist" in example.sides[0].why[0]


def test_a_model_that_nobody_knows_costs_the_veil_alone(pair: list[Run], tmp_path: Path) -> None:
    """Runs of older versions, which recorded no geometry, and whose model's folder is gone; recorded, none is needed."""
    for run in pair:
        shutil.copytree(run.folder.url, tmp_path / run.name)
        path = tmp_path / run.name / ".run/run.json"
        written = json.loads(path.read_text())
        written["checkpoint"]["source"] = "/nowhere/model"
        path.write_text(json.dumps(written))
    (example,) = examples(read_runs([f"k={tmp_path / 'trimmed'}"], f"b={tmp_path / 'full'}", {}), "r5")
    assert example.sides[1].why == []
    for run in pair:
        path = tmp_path / run.name / ".run/run.json"
        written = json.loads(path.read_text())
        del written["checkpoint"]["vision_config"]
        path.write_text(json.dumps(written))
    (example,) = examples(read_runs([f"k={tmp_path / 'trimmed'}"], f"b={tmp_path / 'full'}", {}), "r5")
    assert len(example.sides[1].pictures) == 1
    assert "not drawn" in example.sides[1].why[0]
    assert "/nowhere/model" in example.sides[1].why[0]


def test_ids_that_a_side_lacks_and_lists_of_references(tmp_path: Path) -> None:
    both = {"question": "why?", "answers": ["a", "b", "a"]}
    write_run(tmp_path / "one", [{"id": "x", "text": "1", **both}, {"id": "y", "text": "2", **both}])
    write_run(tmp_path / "two", [{"id": "x", "text": "3", **both}], config={"policy": "trimmed-llama"})
    runs = read_runs([f"two={tmp_path / 'two'}"], f"one={tmp_path / 'one'}", {})
    (example,) = examples(runs, "y", "x", references="answers")
    assert (example.id, example.references, [side.text for side in example.sides]) == ("x", ("a", "b"), ["1", "3"])
    assert example.sides[0].pictures == []
    assert example.sides[0].why
