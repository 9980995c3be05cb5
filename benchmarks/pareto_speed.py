"""From finished cells to ``pareto.json``: what was timed end to end, from images' files to texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.pareto_bench import Cell
from benchmarks.pareto_contenders import ALL_ROWS, CHALLENGERS, POOLED, RIVALS, Way
from benchmarks.pareto_scores import Result, Scores
from benchmarks.timing import median_interval
from demo.shards import Row

PARTS = ("preparing", "tower", "prefill", "decode")


def end_to_end(ways: Sequence[Way], cells: Sequence[Sequence[Cell]], rows: Sequence[Row]) -> Result:
    """Every way's numbers, beside all rows' block by block and row for row; and each rival beside a challenger as fast.

    Args:
        ways: all rows and pooled among them.
        cells: of each, block by block.
        rows: in the order of the blocks.
    """
    scores = Scores(rows)
    right = [scores.right("".join(cell["right"] for cell in each)) for each in cells]
    points = [point(way, each) for way, each in zip(ways, cells, strict=True)]
    names = [way.name for way in ways]
    whole, pooled = names.index(ALL_ROWS), names.index(POOLED)

    def times_as_fast(one: int, other: int) -> Result:
        return times(points[other]["seconds"], points[one]["seconds"])

    for number, one in enumerate(points):
        one["share"] = one["held_bytes"] / points[whole]["held_bytes"]
        one["accuracy"] = scores.share(right[number])
        one["times_all_rows"] = times_as_fast(number, whole)
        one["times_pooled"] = times_as_fast(number, pooled)
        one["more_than_all_rows"] = scores.less(right[number], right[whole])
    challengers = [number for number, name in enumerate(names) if name in CHALLENGERS]
    matches = []
    for rival in (number for number, name in enumerate(names) if name in RIVALS):
        faster = [number for number in challengers if shown_as_fast(times_as_fast(number, rival))]
        # The slowest that is as fast, or what is fastest at all: chosen by speed alone, without a look at the answers.
        sign = 1 if faster else -1
        ours = max(faster or challengers, key=lambda n: sign * statistics.median(points[n]["seconds"]))
        matches.append(
            {
                "rival": rival,
                "ours": ours,
                "as_fast": bool(faster),
                "times": times_as_fast(ours, rival),
                "more": scores.less(right[ours], right[rival]),
            }
        )
    return {"points": points, "at_equal_speed": matches}


def point(way: Way, cells: Sequence[Cell]) -> Result:
    """One way's numbers. ``seconds`` are an image's, block by block; ``tower_keep_fraction`` is of the tiles it came as."""
    rows, images = (sum(cell[name] for cell in cells) for name in ("rows", "images_encoded"))
    seconds = [(cell["preparing"] + cell["wall"]) / cell["images_encoded"] for cell in cells]
    return {
        "contender": way.name,
        "parameter": way.parameter,
        "policy": repr(way.policy),
        "view": way.view.name,
        "max_tiles": way.view.max_tiles,
        "tower_tiles": way.view.tower_tiles,
        "tower_policy": None if way.view.tower_policy is None else repr(way.view.tower_policy),
        "images_per_second": 1 / statistics.median(seconds),
        "seconds": seconds,
        "ms_per_image": {name: 1000 * sum(cell[name] for cell in cells) / images for name in PARTS},
        "held_bytes": statistics.mean(cell["held_bytes"] for cell in cells),
        "tower_keep_fraction": sum(cell["tower_keep_fraction"] * cell["rows"] for cell in cells) / rows,
    }


def times(above: Sequence[float], below: Sequence[float]) -> Result:
    """The median of ratios within a block, with its interval."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, high = median_interval(ratios)
    return {"value": statistics.median(ratios), "low": low, "high": high}


def shown_as_fast(found: Result) -> bool:
    """Not by luck: a setting that is a little slower answers a little better."""
    return bool((found["value"] if found["low"] is None else found["low"]) >= 1)
