"""From finished cells to ``pareto.json``: what was timed end to end, from images' files to texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.pareto_contenders import ALL_ROWS, CHALLENGERS, RIVALS
from benchmarks.pareto_run import Cell, Entry
from benchmarks.pareto_scores import Result, Scores
from benchmarks.timing import median_interval
from demo.shards import Row

PARTS = ("preparing", "tower", "prefill", "decode")


def end_to_end(entries: Sequence[Entry], cells: Sequence[Sequence[Cell]], rows: Sequence[Row]) -> Result:
    """Every way's numbers, compared with all rows' block by block and row for row; and each rival with what is as fast.

    Args:
        entries: the ways.
        cells: of each, block by block.
        rows: in the order of the blocks.
    """
    scores = Scores(rows)
    right = [scores.right("".join(cell["right"] for cell in each)) for each in cells]
    points = [point(entry, each) for entry, each in zip(entries, cells, strict=True)]
    (whole,) = (number for number, entry in enumerate(entries) if entry.contender == ALL_ROWS)

    def times_as_fast(one: int, other: int) -> Result:
        return times(points[other]["seconds"], points[one]["seconds"])

    for number, one in enumerate(points):
        one["share"] = one["held_bytes"] / points[whole]["held_bytes"]
        one["accuracy"] = scores.share(right[number])
        one["times_all_rows"] = times_as_fast(number, whole)
        one["less_than_all_rows"] = scores.less(right[number], right[whole])
    matches = []
    for rival in (number for number, one in enumerate(points) if one["contender"] in RIVALS):
        for name in CHALLENGERS:
            line = [number for number, one in enumerate(points) if one["contender"] == name]
            faster = [number for number in line if times_as_fast(number, rival)["value"] >= 1]
            # The slowest that is as fast: chosen by speed alone, without a look at the answers.
            ours = max(faster or line, key=lambda n: statistics.median(points[n]["seconds"]) * (1 if faster else -1))
            matches.append(
                {
                    "rival": rival,
                    "ours": ours,
                    "as_fast": bool(faster),
                    "times": times_as_fast(ours, rival),
                    "less": scores.less(right[ours], right[rival]),
                }
            )
    return {"points": points, "at_equal_speed": matches}


def point(entry: Entry, cells: Sequence[Cell]) -> Result:
    """One way's numbers. ``seconds`` are an image's, block by block."""
    rows, images = (sum(cell[name] for cell in cells) for name in ("rows", "images_encoded"))
    seconds = [(cell["preparing"] + cell["wall"]) / cell["images_encoded"] for cell in cells]
    kept = {name: sum(cell[name] * cell["rows"] for cell in cells) / rows for name in ("tower_keep_fraction", "keep_fraction")}
    return {
        "contender": entry.contender,
        "parameter": entry.parameter,
        "policy": repr(entry.policy),
        "view": entry.view.name,
        "tower_tiles": entry.view.tower_tiles,
        "tower_policy": None if entry.view.tower_policy is None else repr(entry.view.tower_policy),
        "images_per_second": 1 / statistics.median(seconds),
        "seconds": seconds,
        "ms_per_image": {name: 1000 * sum(cell[name] for cell in cells) / images for name in PARTS},
        "held_bytes": statistics.mean(cell["held_bytes"] for cell in cells),
        **kept,
    }


def times(above: Sequence[float], below: Sequence[float]) -> Result:
    """The median of ratios within a block, with its interval."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, high = median_interval(ratios)
    return {"value": statistics.median(ratios), "low": low, "high": high}
