"""Where a kept feature lies on the picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from demo import scenes
from demo.answerer import Answerer
from demo.architecture import build_processor
from demo.picture import GAP, PANEL, PER_SIDE, ROOT, TOKENS, first_of_each_tile_count, patch_box, strip, veil


@pytest.fixture(scope="module")
def image_processor():
    return build_processor([]).image_processor


@pytest.mark.parametrize(
    ("size", "grid"), [((100, 97), (1, 1)), ((220, 100), (1, 2)), ((104, 330), (3, 1)), ((210, 200), (2, 2))]
)
def test_boxes_lie_where_the_processor_puts_the_pixels(image_processor, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """A dark spot in the middle of a patch's box makes that patch, and no other, the darkest of the processor's tiles."""
    for position in range(0, grid[0] * grid[1] * TOKENS, 13):
        box = patch_box(position, grid, size)
        if box is None or box[2] > size[0] or box[3] > size[1]:
            continue
        image = Image.new("RGB", size, (255, 255, 255))
        left, top, right, bottom = box
        image.paste((0, 0, 0), (round(left + 4), round(top + 4), round(right - 4), round(bottom - 4)))
        out = image_processor([[image]], return_tensors="np", do_normalize=False)
        assert out["num_tiles"][0][0] == grid[0] * grid[1]
        # Padding is black too: count only what differs from the same picture without the spot.
        plain = image_processor([[Image.new("RGB", size, (255, 255, 255))]], return_tensors="np", do_normalize=False)
        spot = (plain["pixel_values"] - out["pixel_values"])[0, 0].sum(1)
        patches = spot.reshape(4, PER_SIDE, 14, PER_SIDE, 14).sum((2, 4)).reshape(4, -1)
        tile, patch = np.unravel_index(patches.argmax(), patches.shape)
        assert tile * TOKENS + 1 + patch == position


def test_boxes_tile_the_canvas_once() -> None:
    boxes = [patch_box(p, (2, 2), (2 * scenes.TILE, 2 * scenes.TILE)) for p in range(4 * TOKENS)]
    assert boxes.count(None) == 4, "class tokens are nowhere"
    corners = {box[:2] for box in boxes if box}
    assert corners == set(itertools.product(range(0, 2 * scenes.TILE, 14), repeat=2))


def test_kept_patches_stay_clear_and_the_rest_is_veiled() -> None:
    image = Image.new("RGB", (112, 112), (250, 0, 0))
    veiled = veil(image, [0, 1, TOKENS - 1], (1, 1))
    assert veiled.size == (448, 448)
    assert veiled.getpixel((10, 10)) == (250, 0, 0)
    assert veiled.getpixel((440, 440)) == (250, 0, 0)
    assert veiled.getpixel((200, 200)) != (250, 0, 0)
    assert np.array(veil(image, range(TOKENS), (1, 1))).reshape(-1, 3).min(0).tolist() == [250, 0, 0]


def test_a_scene_becomes_a_row_of_panels_and_each_veils_more_than_the_one_before() -> None:
    answerer = Answerer(ROOT / "demo/model")
    index = first_of_each_tile_count(answerer)[1]
    row = np.array(strip(answerer, index, [0.25, 0.05]))
    assert row.shape[1] == 3 * (PANEL + GAP) + GAP
    panels = [row[:, GAP + i * (PANEL + GAP) :][:, :PANEL] for i in range(3)]
    veiled = [int((panel.max(-1) < 130).sum()) for panel in panels]
    assert veiled == sorted(veiled)
    assert veiled[0] < veiled[2]
