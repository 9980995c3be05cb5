"""The picture of kept features over demo scenes."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from demo import MODEL
from demo.answerer import Answerer
from demo.picture import GAP, PANEL, Way, broken, first_of_each_tile_count, main, strip
from demo.scenes import FLAT
from demo.shards import scene_rows
from trimming import Clusters, KeepAll, TrimmedLlama
from trimming.tower import Alike


def test_a_scene_becomes_a_row_of_panels_that_veil_more_and_more_and_one_of_regions() -> None:
    answerer = Answerer(MODEL)
    index = first_of_each_tile_count(answerer, FLAT)[1]
    ways = [Way("half", TrimmedLlama(0.25)), Way("less", TrimmedLlama(0.05)), Way("like", Clusters(likeness=0.9))]
    ways.append(Way("in the tower", KeepAll(), Alike(0.5)))
    row = np.array(strip(answerer, FLAT, index, ways))
    assert row.shape[1] == 5 * (PANEL + GAP) + GAP
    panels = [row[:, GAP + i * (PANEL + GAP) :][:, :PANEL] for i in range(5)]
    veiled = [int((panel.max(-1) < 130).sum()) for panel in panels[:3]]
    assert veiled == sorted(veiled)
    assert veiled[0] < veiled[2]
    # Regions are coloured, the scene's paper is grey.
    coloured = [int((np.ptp(panel, -1) > 60).sum()) for panel in panels]
    assert min(coloured[3:]) > 2 * coloured[0]
    # Where nothing is merged, the scene is as it is.
    whole = np.array(strip(answerer, FLAT, index, [Way("all", Clusters(likeness=1.0))]))[:, GAP + PANEL + GAP :]
    assert int((np.ptp(whole, -1) > 60).sum()) < 1.2 * coloured[0]


@pytest.mark.parametrize("given", [["--likeness", "0.9", "1.5"], ["--k-ratio", "0.0"], ["--broken", "0"]], ids=" ".join)
def test_bad_options_are_refused_before_anything_loads(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", "unused.png", *given])
    assert f"error: {given[0]} {' '.join(given[1:])}: give" in capsys.readouterr().err


def test_scenes_that_merging_breaks_are_found() -> None:
    """At a likeness of 0.5 next to nothing is left; each found scene's caption is exact with all features."""
    answerer = Answerer(MODEL)
    found = list(islice(broken(answerer, FLAT, 0.5), 2))
    assert len(found) == 2
    for index in found:
        (row,) = next(islice(scene_rows("test", index + 1, ("caption",)), index, None))
        (full,), (merged,) = (answerer.answer(answerer.engine(p), [row]) for p in (KeepAll(), Clusters(likeness=0.5)))
        assert full.right
        assert not merged.right
