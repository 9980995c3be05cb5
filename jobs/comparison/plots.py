"""The report's other plots: what was kept, asked and said, and where the time goes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.comparison import words
from jobs.comparison.drawing import COLOURS, FIELD, INK, Drawing, Plot, percent, short
from jobs.comparison.tables import per_thousand
from jobs.report import STAGES, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = dict[str, Any]
STAGE_COLOURS: dict[Stage, str] = {"tower": "#0072b2", "prefill": "#56b4e9", "decode": "#e69f00"}
BESIDE = "decode_images"
NAMES = {"tower": "vision tower", "prefill": "prefill", "decode": "decode", BESIDE: "decoding images"}


def kept(report: Report) -> Iterator[Plot]:
    """A histogram of the share of features kept for each run that drops any, all on one scale."""
    runs = [
        run for run in report["runs"] if run["kept"] and sum(run["kept"]["histogram"]["counts"]) and run["kept"]["mean"] < 1
    ]
    if not runs:
        return
    most = max(max(_shares(run["kept"]["histogram"]["counts"])) for run in runs)
    for number, run in enumerate(runs, 1):
        histogram = run["kept"]["histogram"]
        text = f"{run['name']}: histogram of the share of features kept; mean {run['kept']['mean']:.1%}"
        with Drawing(f"kept-{number}", 3.4, 1.7) as (_, axes, made):
            edges, counts = histogram["edges"], _shares(histogram["counts"])
            axes.bar(
                edges[:-1],
                counts,
                [b - a for a, b in itertools.pairwise(edges)],
                align="edge",
                color=COLOURS[0],
                linewidth=0,
            )
            axes.axvline(run["kept"]["mean"], color=INK, linewidth=1)
            left = run["kept"]["mean"] > 0.5
            axes.annotate(
                f"mean {run['kept']['mean']:.1%}",
                (run["kept"]["mean"], most * 1.04),
                (-4 if left else 4, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="bottom",
            )
            axes.set(xlim=(0, 1), ylim=(0, most * 1.2), xlabel="share of features kept", ylabel="share of rows")
            percent(axes.xaxis, axes.yaxis, decimals=0)
            yield made(run["name"], text, small=True)


def counts(report: Report) -> Iterator[Plot]:
    """Tiles of a row and questions about an image, once for runs that have the same."""
    asked: list[tuple[str, str, str, Callable[[Report], Any]]] = [
        ("tiles", "tiles of a row", "share of rows", lambda run: run["tiles_per_row"]),
        (
            "questions",
            "questions about an image",
            "share of images",
            lambda run: (run["questions_per_image"] or {}).get("histogram"),
        ),
    ]
    for name, across, up, histogram in asked:
        same: dict[tuple[tuple[int, int], ...], list[str]] = {}
        for run in report["runs"]:
            if found := tuple((int(value), int(rows)) for value, rows in histogram(run) or ()):
                same.setdefault(found, []).append(run["name"])
        for number, (found, names) in enumerate(same.items(), 1):
            title = f"{across.capitalize()}: {_several(names, len(report['runs']))}"
            said = ", ".join(
                f"{value}: {part:.1%}" for (value, _), part in zip(found, _shares([rows for _, rows in found]), strict=True)
            )
            with Drawing(f"{name}-{number}", 3.4, 1.7) as (_, axes, made):
                _bars(axes, found)
                axes.set(xlabel=across, ylabel=up)
                percent(axes.yaxis, decimals=0)
                yield made(title, f"{title}. {said if len(found) <= 12 else ''}".strip(), small=True)


def tokens(report: Report) -> Iterator[Plot]:
    """The spread of each run's output tokens."""
    runs = [run for run in report["runs"] if run["output_tokens"] and run["output_tokens"]["p50"] is not None]
    if not runs:
        return
    with Drawing("output-tokens", FIELD, 0.75 + 0.42 * len(runs)) as (_, axes, made):
        for place, run in enumerate(runs):
            found = run["output_tokens"]
            axes.plot(
                [found["p5"], found["p95"]], [place, place], color=COLOURS[0], linewidth=5, alpha=0.35, solid_capstyle="butt"
            )
            axes.plot([found["p50"]], [place], "o", color=COLOURS[0])
            axes.plot([found["p99"]], [place], "|", color=COLOURS[0], markersize=10)
            axes.annotate(
                short(run["name"]), (0, place), (2, 7), textcoords="offset points", va="bottom", ha="left", fontsize=8.5
            )
        axes.set(xlim=(0, None), ylim=(len(runs) - 0.5, -0.85), xlabel="output tokens of a row", yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        yield made("Output tokens", "Each run's median (dot), 5th to 95th percentile (bar) and 99th (tick) of output tokens")


def stages(report: Report) -> Iterator[Plot]:
    """Seconds per 1,000 images: what the device does stacked, what runs beside it on a line of its own."""
    runs = [run for run in report["runs"] if run["images"] and any(run["stages"].get(stage) for stage in (*STAGES, BESIDE))]
    if not runs:
        return
    with Drawing("stages", FIELD, 0.95 + 0.62 * len(runs)) as (figure, axes, made):
        longest = max(per_thousand(run, *STAGES) for run in runs)
        for place, run in enumerate(runs):
            left = 0.0
            for stage, colour in STAGE_COLOURS.items():
                wide = per_thousand(run, stage)
                axes.barh(place, wide, 0.36, left, color=colour, linewidth=0, label=NAMES[stage] if place == 0 else None)
                if wide > 0.07 * longest:
                    axes.text(
                        left + wide / 2, place, words.number(wide), ha="center", va="center", fontsize=8.5, color=_on(colour)
                    )
                left += wide
            axes.annotate(
                f"{words.number(left)} s", (left, place), (4, 0), textcoords="offset points", va="center", fontweight="bold"
            )
            beside = per_thousand(run, BESIDE)
            axes.barh(
                place + 0.25,
                beside,
                0.1,
                color="#8c959f",
                linewidth=0,
                label=NAMES[BESIDE] if place == 0 else None,
            )
            axes.annotate(short(run["name"], 48), (0, place - 0.2), (1, 2), textcoords="offset points", va="bottom", fontsize=9)
        axes.set(ylim=(len(runs) - 0.45, -0.55), yticks=[], xlabel="seconds per 1,000 images, summed over actors")
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=1, handleheight=0.8, columnspacing=1.1)
        said = "; ".join(f"{run['name']}: {words.number(per_thousand(run, *STAGES))} s" for run in runs)
        yield made("Where the time goes", f"Seconds per 1,000 images by stage. {said}")


def _bars(axes: Axes, histogram: Sequence[tuple[int, int]]) -> None:
    values, shares = [value for value, _ in histogram], _shares([rows for _, rows in histogram])
    bars = axes.bar(values, shares, 0.8, color=COLOURS[0], linewidth=0)
    axes.set_ylim(0, max(shares) * 1.2)
    if len(values) <= 8:
        axes.bar_label(bars, [f"{part:.0%}" if part >= 0.005 else "<1%" for part in shares], padding=2, fontsize=8.5)
        if max(values) - min(values) <= 12:
            axes.set_xticks(values)
    if len(values) == 1:
        axes.set_xlim(values[0] - 2, values[0] + 2)


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _on(colour: str) -> str:
    """Black or white, whichever is read on ``colour``."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#ffffff"


def _several(names: Sequence[str], runs: int) -> str:
    if len(names) == runs:
        return "all runs"
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} others"
