"""The picture of kept features over demo scenes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from demo.answerer import Answerer
from demo.picture import GAP, GEOMETRY, PANEL, ROOT, first_of_each_tile_count, strip, veil
from jobs.comparison.overlay import Geometry


def test_the_geometry_is_the_demo_models() -> None:
    from pipeline.model import find_checkpoint

    assert Geometry.of(find_checkpoint(str(ROOT / "demo/model"), None).config) == GEOMETRY


def test_kept_patches_stay_clear_and_the_rest_is_veiled() -> None:
    image = Image.new("RGB", (112, 112), (250, 0, 0))
    veiled = veil(image, [0, 1, GEOMETRY.tokens - 1], (1, 1))
    assert veiled.size == (448, 448)
    assert veiled.getpixel((10, 10)) == (250, 0, 0)
    assert veiled.getpixel((440, 440)) == (250, 0, 0)
    assert veiled.getpixel((200, 200)) != (250, 0, 0)
    assert np.array(veil(image, range(GEOMETRY.tokens), (1, 1))).reshape(-1, 3).min(0).tolist() == [250, 0, 0]


def test_a_scene_becomes_a_row_of_panels_that_veil_more_and_more_and_one_of_regions() -> None:
    answerer = Answerer(ROOT / "demo/model")
    index = first_of_each_tile_count(answerer)[1]
    row = np.array(strip(answerer, index, [0.25, 0.05], [0.9]))
    assert row.shape[1] == 4 * (PANEL + GAP) + GAP
    panels = [row[:, GAP + i * (PANEL + GAP) :][:, :PANEL] for i in range(4)]
    veiled = [int((panel.max(-1) < 130).sum()) for panel in panels[:3]]
    assert veiled == sorted(veiled)
    assert veiled[0] < veiled[2]
    # Regions are coloured, the scene's paper is grey.
    coloured = [int((np.ptp(panel, -1) > 60).sum()) for panel in panels]
    assert coloured[3] > 2 * coloured[0]
