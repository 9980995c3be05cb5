"""``pareto.md``'s tables of what was timed end to end."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.pareto_contenders import ALL_ROWS, CONTROLS, POOLED
from benchmarks.pareto_scores import ALL
from benchmarks.pareto_words import Point, Report, interval, percent, plus_minus
from demo.table import row

LOSSES = (0.005, 0.01, 0.02)
"""Shares of right answers lost, at most, for which the fastest setting is named."""
ABOUT = (
    "End to end, from images' files to texts, by an engine that has seen none of the images; each goes through the tower "
    "once, for all questions about it. Padding tiles' rows are pooled where nothing else is said. Speed is the median over "
    f"blocks, of the fastest of three passes each; beside {ALL_ROWS} (every padding row through every layer) and {POOLED} it "
    "is the median of ratios within a block, with its 95 % interval by order statistics. *rows × layers*: the share of the "
    "tower that the rows of real tiles are left with. *tower*: milliseconds an image, projector and clustering included, a "
    f"mean. *held*: the most bytes of images' keys and values at once, in % of {ALL_ROWS}'."
)


def speed(data: Report) -> Iterator[str]:
    """A data set's."""
    points = data["end_to_end"]["points"]
    beside = (f"× {ALL_ROWS}", f"× {POOLED}")
    last = ("tower, ms", "held", "right", f"more than {ALL_ROWS}', points")
    yield row(["way", "at", "rows × layers", "images/s", *beside, *last])
    yield row(["---", *["---:"] * 8, "---"])
    for one in points:
        more = one["more_than_all_rows"][ALL]
        yield row(
            [
                label(one["contender"]),
                "" if one["parameter"] is None else f"{one['parameter']:g}",
                # Of fewer tiles all rows go through all layers, but not of all tiles.
                "" if one["max_tiles"] else percent(one["tower_keep_fraction"]),
                f"{one['images_per_second']:.1f}",
                ratio(one["times_all_rows"]),
                f"{one['times_pooled']['value']:.2f}",
                f"{one['ms_per_image']['tower']:.1f}",
                percent(one["share"]),
                plus_minus(one["accuracy"][ALL]),
                "" if one["contender"] == ALL_ROWS else f"{interval(more)}: {more['verdict']}",
            ]
        )
    yield ""
    yield (
        "At equal images/s: beside each rival the slowest setting of ours that is shown to be at least as fast (the interval "
        "of its ratio begins at 1). Where speeds hardly differ, as with few rows a tile, it keeps far fewer rows than the "
        "rival does: compare them in the table above. The demo models have not learnt to see smaller objects, nor images "
        "without padding."
    )
    yield ""
    yield row(["rival", "right", "ours", "× as fast", "right", "ours more, points"])
    yield row(["---", "---:", "---", "---:", "---:", "---"])
    for match in data["end_to_end"]["at_equal_speed"]:
        rival, ours, more = points[match["rival"]], points[match["ours"]], match["more"][ALL]
        yield row(
            [
                titled(rival),
                plus_minus(rival["accuracy"][ALL]),
                titled(ours),
                ratio(match["times"]),
                plus_minus(ours["accuracy"][ALL]),
                f"{interval(more)}: {more['verdict']}" if match["as_fast"] else "none is shown to be as fast",
            ]
        )
    yield ""
    fastest = "; ".join(named(points, loss) for loss in LOSSES)
    yield f"**Fastest that is shown to lose no more**, by the interval's end: {fastest}."


def named(points: list[Point], loss: float) -> str:
    """The fastest of all that loses so much at most."""
    kept = [one for one in points if at_worst(one["more_than_all_rows"][ALL]) >= -loss]
    found = max(kept, key=lambda one: one["times_all_rows"]["value"])
    return f"than {100 * loss:g} points {titled(found)}, {ratio(found['times_all_rows'])} ×"


def at_worst(found: Report) -> float:
    return float(found["value"] if found["low"] is None else found["low"])


def titled(one: Point) -> str:
    """A way and where on it."""
    return label(one["contender"]) + ("" if one["parameter"] is None else f" {one['parameter']:g}")


def label(name: str) -> str:
    return f"{name} (control)" if name in CONTROLS else name


def ratio(found: Report) -> str:
    text = f"{found['value']:.2f}"
    return text if found["low"] is None else f"{text} ({found['low']:.2f} to {found['high']:.2f})"
