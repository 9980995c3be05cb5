"""Quality against held bytes, bytes held over time, and seconds; and of ways through the tower, timed end to end, against
images/s and held bytes: a plot each, the data sets side by side.

A line's dash says where its policy looks, its colour and marker which one it is, hollow where each question keeps a set of its
own; every line is also named at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.pareto_contenders import ALL_ROWS, BEHIND, BY_QUESTION, FEWER, OURS, POOLED, REAL
from benchmarks.pareto_scores import ALL
from benchmarks.pareto_words import Point, Report
from jobs.comparison.drawing import INK, Drawing, as_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AFTER_FIRST, EACH_LAYER, FEATURES, OTHER = "-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1, 1.3))
GREY = "#7a828a"


@dataclass(frozen=True, slots=True)
class Look:
    colour: str
    marker: str
    dash: Any = AFTER_FIRST


# Okabe and Ito's colours.
LOOKS = {
    "all features": Look(INK, "*"),
    "trimmed-llama": Look("#000000", "o"),
    "fastv": Look("#0072b2", "s"),
    "weighted-farthest": Look("#d55e00", "D"),
    "spread": Look("#b2182b", "p"),
    "zipvl": Look("#009e73", "^", EACH_LAYER),
    "snapkv": Look("#cc79a7", "v", EACH_LAYER),
    "elastic": Look("#e69f00", "P", EACH_LAYER),
    "divprune": Look("#56b4e9", "X", FEATURES),
    "visionzip": Look("#8a5a00", "h", FEATURES),
    "visionzip-weighted": Look("#b58a4a", "h", FEATURES),
    "elastic-weighted": Look("#f5c76b", "P", EACH_LAYER),
    "clusters": Look("#008b8b", "*", FEATURES),
    "clusters, a share": Look("#40c4c4", "8", FEATURES),
    "think": Look("#6a3d9a", "d", OTHER),
    "random": Look(GREY, "x", OTHER),
    "grid": Look(GREY, "+", OTHER),
    FEWER: Look("#4d4d4d", "<", (0, (8, 2))),
    "lower resolution": Look("#4d4d4d", ">", (0, (8, 2))),
    ALL_ROWS: Look(INK, "*"),
    POOLED: Look("#000000", "h"),
    REAL: Look("#4d4d4d", "H", (0, (8, 2))),
    OURS: Look("#008b8b", "o"),
    BEHIND: Look("#0072b2", "D"),
    "alike, not weighted": Look("#40c4c4", "p"),
    "tome": Look("#d55e00", "s", EACH_LAYER),
    "windows": Look("#e69f00", "v", EACH_LAYER),
    "evit": Look("#cc79a7", "P", FEATURES),
    "random rows": Look(GREY, "x", OTHER),
    "grid rows": Look(GREY, "+", OTHER),
}
OWN = (Look("#d55e00", "p"), Look("#0072b2", "8"), Look("#009e73", "H"), Look("#cc79a7", "*"))
"""For contenders without a look of their own."""


@dataclass(frozen=True, slots=True)
class Across:
    """What a plot's horizontal axis shows."""

    text: str
    place: Callable[[Point], float]
    end_to_end: bool = False
    """Whether its points are those timed from images' files on."""
    more_is_better: bool = False


def plots(report: Report) -> dict[str, str]:
    """SVG by name."""
    axes = {
        "pareto-kv": Across("cross KV held at once, MB (log scale)", held_megabytes),
        "pareto-byte-seconds": Across(
            "cross KV held over time per question, kB s (log scale)",
            lambda point: point["held_byte_seconds_per_row"] / 1e3,
        ),
        "pareto-time": Across(
            "prefill and decoding per question, ms (log scale; CPU, fp32)",
            lambda point: point["ms_per_row"]["both"],
        ),
        "pareto-speed": Across(
            "images/s, end to end (log scale; CPU, fp32)", lambda point: point["images_per_second"], True, more_is_better=True
        ),
        "pareto-tower-kv": Across("cross KV held at once, MB (log scale)", held_megabytes, True),
    }
    return {name: figure(report, name, across) for name, across in axes.items()}


def held_megabytes(point: Point) -> float:
    return point["held_bytes"] / 1e6


def figure(report: Report, name: str, across: Across) -> str:
    """One plot for each data set, two abreast: a line a contender, with intervals, and its name at its cheapest end; of one
    set a question hollow, and named as the full one."""
    place = across.place
    sets = report["sets"]
    with ExitStack() as stack:
        columns = min(2, len(sets))
        down = -(-len(sets) // columns)
        whole, only, made = stack.enter_context(Drawing(name, 5.6 * columns, 6.2 * down))
        only.remove()
        places = whole.subplots(down, columns, squeeze=False).flatten()
        for unused in places[len(sets) :]:
            unused.remove()
        handles: dict[str, Any] = {}
        for axes, (title, data) in zip(places, sets.items(), strict=False):
            axes.patch.set_alpha(0)
            series = lines(report, data, across)
            ends = []
            for contender, points in series.items():
                hollow = contender.endswith(BY_QUESTION)
                drawn = draw(axes, look(report, contender), points, place, hollow)
                if hollow:
                    continue
                handles[contender] = drawn
                if contender not in ("all features", ALL_ROWS):
                    ends.append((contender, place(points[-1]), points[-1]["accuracy"][ALL]["value"]))
            scale(axes, [point for points in series.values() for point in points], across)
            axes.set_title(f"{title}, {data['rows']:,} questions", fontsize=10.5, loc="left")
            axes.set_xlabel(across.text)
            hollow_is = "" if across.end_to_end else "; hollow: a kept set a question"
            axes.set_ylabel(f"right answers (scale of errors{hollow_is})")
            name_ends(axes, report, ends, across.more_is_better)
        whole.legend(
            handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, handlelength=3.2, columnspacing=1.6
        )
        text = f"Right answers against {across.text}, with 95 % intervals. " + "; ".join(
            f"{title}: "
            + ", ".join(f"{c} {p['accuracy'][ALL]['value']:.1%} at {place(p):.3g}" for c, ps in s.items() for p in ps)
            for title, s in ((title, lines(report, data, across)) for title, data in sets.items())
        )
        return as_file(made(name, text))


def lines(report: Report, data: Report, across: Across) -> dict[str, list[Point]]:
    """Points by contender, the dearest first; of the reference also those that match fewer tiles."""
    points = data["end_to_end"]["points"] if across.end_to_end else data["points"]
    order = ["all features", *report["contenders"], FEWER, "lower resolution"]
    names = dict.fromkeys(point["contender"] for point in points) if across.end_to_end else order
    found = {name: [point for point in points if point["contender"] == name] for name in names}
    # Not by what was timed, which may cross.
    return {
        name: sorted(points, key=lambda each: (-each.get("tower_keep_fraction", 1), -each["share"]))
        for name, points in found.items()
        if points
    }


def look(report: Report, contender: str) -> Look:
    contender = contender.removesuffix(BY_QUESTION)
    if contender in LOOKS:
        return LOOKS[contender]
    ways = [point["contender"] for data in report["sets"].values() for point in data["end_to_end"]["points"]]
    names = dict.fromkeys([*report["contenders"], *ways])
    own = [name for name in names if name not in LOOKS and not name.endswith(BY_QUESTION)]
    return OWN[own.index(contender) % len(OWN)]


def draw(axes: Axes, style: Look, points: list[Point], place: Callable[[Point], float], hollow: bool) -> Any:
    xs, scores = [place(point) for point in points], [point["accuracy"][ALL] for point in points]
    ys = [each["value"] for each in scores]
    low = [0 if each["low"] is None else each["value"] - each["low"] for each in scores]
    high = [0 if each["high"] is None else each["high"] - each["value"] for each in scores]
    thick = style.colour == "#000000"
    return axes.errorbar(
        xs,
        ys,
        [low, high],
        color=style.colour,
        marker=style.marker,
        linestyle=style.dash,
        markersize=12 if style.marker == "*" else 6,
        markerfacecolor="white" if hollow else style.colour,
        linewidth=0.8 if hollow else 2.2 if thick else 1.3,
        elinewidth=0.8,
        alpha=0.95,
        zorder=4 if thick else 3,
    )


def scale(axes: Axes, points: list[Point], across: Across) -> None:
    """Both axes: logarithmic in cost, and in errors, so that 99 % stands as far from 98 % as 90 % from 80 %."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ends = [(each["low"] or each["value"], each["value"]) for each in (point["accuracy"][ALL] for point in points)]
    lowest, highest = min(low for low, _ in ends), max(value for _, value in ends)
    least = max(0.001, (1 - highest) / 2)

    def up(y: Any) -> Any:
        return -np.log10(np.maximum(1 + least - y, least / 4))

    def down(v: Any) -> Any:
        return 1 + least - 10.0 ** (-v)

    axes.set_yscale("function", functions=(up, down))
    room = 0.05 * (up(highest) - up(lowest))
    axes.set_ylim(down(up(lowest) - room), down(up(highest) + room))
    shown = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 1.0)
    ticks: list[float] = []
    for y in reversed(shown):
        # Room for its number.
        if down(up(lowest) - room) < y < down(up(highest) + room) and (not ticks or up(ticks[-1]) - up(y) > 0.7 * room):
            ticks.append(y)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.set_xscale("log")
    xs = [across.place(point) for point in points]
    names = (max(xs) / min(xs)) ** 0.34
    axes.set_xlim(*(min(xs) / 1.12, max(xs) * names) if across.more_is_better else (min(xs) / names, max(xs) * 1.12))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if max(xs) < 5 * min(xs) else (1, 1.5, 2, 3, 5, 7)
    round_ones = [step * 10.0**power for power in range(-3, 5) for step in steps]
    axes.xaxis.set_major_locator(FixedLocator([x for x in round_ones if min(xs) / 1.12 <= x <= max(xs) * 1.12]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid()


def name_ends(axes: Axes, report: Report, ends: list[tuple[str, float, float]], right: bool) -> None:
    """Names lines at the plot's left edge, or its ``right``, moved apart, each with a hair line to its last point."""
    figure = axes.figure
    figure.canvas.draw()
    box = axes.get_window_extent()
    step = 12.5 / box.height * figure.dpi / 72
    places = sorted((axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1], c, x, y) for c, x, y in ends)
    spots = [max(0.02, place) for place, *_ in places]
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + step)
    for i in range(len(spots) - 1, -1, -1):
        most = 0.985 if i == len(spots) - 1 else spots[i + 1] - step
        spots[i] = min(spots[i], most)
    for spot, (_, contender, x, y) in zip(spots, places, strict=True):
        axes.annotate(
            contender,
            (x, y),
            (0.99 if right else 0.01, spot),
            textcoords="axes fraction",
            fontsize=8.5,
            ha="right" if right else "left",
            va="center",
            color=look(report, contender).colour,
            arrowprops={
                "arrowstyle": "-",
                "color": look(report, contender).colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkB": 4,
            },
        ).set_in_layout(False)
