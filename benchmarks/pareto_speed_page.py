"""``pareto.md``'s tables of what was timed end to end."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.pareto_contenders import ALL_ROWS, RIVALS
from benchmarks.pareto_scores import ALL
from benchmarks.pareto_words import Point, Report, interval, percent, plus_minus
from demo.table import row

LOSSES = (0.0, 0.005, 0.01)
"""Shares of right answers lost, at most, for which the fastest setting is named."""
ABOUT = (
    "End to end, from images' files to texts, by an engine that has seen none of the images; each goes through the tower once, "
    "for all questions about it. Padding tiles' rows are pooled where nothing else is said. Speed is the median over blocks; "
    f"beside {ALL_ROWS} (every padding row through every layer) it is the median of ratios within a block, with its 95 % "
    "interval by order statistics. *rows × layers*: the share of the tower that real rows are left with. *held*: the most "
    "bytes at once."
)


def speed(data: Report) -> Iterator[str]:
    """A data set's."""
    points = data["end_to_end"]["points"]
    yield row(["line", "at", "rows × layers", "images/s", f"× {ALL_ROWS}", "tower, ms", "held", "right", "less, points"])
    yield row(["---", *["---:"] * 7, "---"])
    for one in points:
        against = one["less_than_all_rows"][ALL]
        yield row(
            [
                one["contender"],
                "" if one["parameter"] is None else f"{one['parameter']:g}",
                percent(one["tower_keep_fraction"]),
                f"{one['images_per_second']:.1f}",
                ratio(one["times_all_rows"]),
                f"{one['ms_per_image']['tower']:.1f}",
                percent(one["share"]),
                plus_minus(one["accuracy"][ALL]),
                "" if one["contender"] == ALL_ROWS else f"{interval(against)}: {against['verdict']}",
            ]
        )
    yield ""
    yield f"At equal images/s: beside each of {', '.join(RIVALS)} the slowest setting that is at least as fast."
    yield ""
    yield row(["", "right", "beside it", "× as fast", "right", "more, points"])
    yield row(["---", "---:", "---", "---:", "---:", "---"])
    for match in data["end_to_end"]["at_equal_speed"]:
        rival, ours, less = points[match["rival"]], points[match["ours"]], match["less"][ALL]
        yield row(
            [
                titled(rival),
                plus_minus(rival["accuracy"][ALL]),
                titled(ours) + ("" if match["as_fast"] else " (slower)"),
                ratio(match["times"]),
                plus_minus(ours["accuracy"][ALL]),
                f"{interval(less)}: {less['verdict']}" if match["as_fast"] else "at another speed",
            ]
        )
    yield ""
    yield "**Fastest as measured**, " + "; ".join(named(points, loss) for loss in LOSSES) + "."


def named(points: list[Point], loss: float) -> str:
    """The fastest of all that loses so much at most."""
    kept = [one for one in points if -one["less_than_all_rows"][ALL]["value"] <= loss]
    best = max(kept, key=lambda one: one["images_per_second"])
    return f"losing at most {100 * loss:g} points: {titled(best)}, {ratio(best['times_all_rows'])} ×"


def titled(one: Point) -> str:
    """A line and where on it."""
    return one["contender"] + ("" if one["parameter"] is None else f" {one['parameter']:g}")


def ratio(found: Report) -> str:
    text = f"{found['value']:.2f}"
    return text if found["low"] is None else f"{text} ({found['low']:.2f} to {found['high']:.2f})"
