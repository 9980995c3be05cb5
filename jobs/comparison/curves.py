"""Quality against cost and against held bytes: a point for each run, with its interval, joined where only an option differs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.comparison import tables, words
from jobs.comparison.drawing import COLOURS, FIELD, INK, Drawing, Plot, percent, short
from pipeline.config import POLICY_OPTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

Report = dict[str, Any]
BASELINE = "baseline"
MARKERS = ("o", "s", "^", "D", "v", "P")
_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def curves(report: Report) -> Iterator[Plot]:
    """Quality against cost and against what was held, where at least two runs have both."""
    priced = tables.priced(report)
    unit = "dollars" if priced else tables.hours(report)
    cost = "dollars_per_million_images" if priced else "gpu_hours_per_million_images"
    yield from _curve(report, "quality-cost", f"{unit} per million images", lambda run: run["cost"][cost])
    most = max(run["held"]["byte_seconds_per_row"] or 0.0 for run in report["runs"])
    name, unit_bytes = next(((name, size) for name, size in _BYTES if most >= size), ("B", 1))
    yield from _curve(
        report,
        "quality-kv",
        f"cross KV held per row, {name}·s",
        lambda run: _over(run["held"]["byte_seconds_per_row"], unit_bytes),
    )


def _curve(report: Report, name: str, across: str, place: Callable[[Report], float | None]) -> Iterator[Plot]:
    score = tables.quality(report)
    points = [_point(report, run, score, place(run)) for run in report["runs"]]
    found = [point for point in points if point is not None]
    if len(found) < 2:
        return
    series: dict[str, list[_Point]] = {}
    for point in found:
        series.setdefault(point.series, []).append(point)
    label = words.METRICS[score] + (" with the baseline" if score in tables.AGREEMENT else "")
    with Drawing(name, FIELD, 3.5) as (figure, axes, made):
        for number, (each, members) in enumerate(series.items()):
            members.sort(key=lambda point: point.order)
            xs, ys = [point.x for point in members], [point.y for point in members]
            low, high = [point.y - point.low for point in members], [point.high - point.y for point in members]
            baseline = each == BASELINE
            colour = INK if baseline else COLOURS[(number - 1) % len(COLOURS)]
            marker = "*" if baseline else MARKERS[(number - 1) % len(MARKERS)]
            axes.errorbar(
                xs,
                ys,
                [low, high],
                color=colour,
                marker=marker,
                markersize=11 if baseline else 6.5,
                linewidth=1.3,
                elinewidth=1.3,
                capsize=2.5,
                label=None if baseline else each,
            )
        axes.set(xlabel=across, ylabel=label, xlim=(0, max(point.x for point in found) * 1.12))
        axes.margins(y=0.18)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.03))
        percent(axes.yaxis)
        axes.grid()
        if len(series) > 1:
            columns = 3 if sum(len(each) for each in series) < 45 else 1
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6, columnspacing=1.4)
        _label(figure, axes, found, list(series.values()))
        said = "; ".join(f"{point.run}: {point.y:.1%} at {words.number(point.x)}" for point in found)
        yield made(f"{label[0].upper()}{label[1:]} against {across}", f"{label} against {across}, with 95% intervals. {said}")


@dataclass(frozen=True, slots=True)
class _Point:
    run: str
    series: str
    label: str
    order: float
    """Place along the series: K, or the most tiles."""
    x: float
    y: float
    low: float
    high: float


def _point(report: Report, run: Report, score: str, x: float | None) -> _Point | None:
    comparison = tables.compared(report, run)
    if score not in tables.AGREEMENT:
        found = words.score(run["scores"].get(score))
    elif comparison is None:
        found = {"value": 1.0, "low": 1.0, "high": 1.0}
    else:
        found = words.score(comparison["agreement"].get(score))
    if found is None or x is None:
        return None
    y = found["value"]
    low, high = (y if found.get(end) is None else found[end] for end in ("low", "high"))
    series, label, order = BASELINE, run["name"], 0.0
    if comparison is not None:
        # Where a run trims and has fewer tiles too, the policy is its series and its whole name its label.
        option, value = next(iter(run["options"].items()), ("", None))
        if run["policy"] == "none" and run["tower"]:
            policy, share = run["tower"].split()
            series, label, order = f"tower {policy}", f"tower {share}", float(share)
            if run["max_tiles"]:
                series += f", max_tiles={run['max_tiles']}"
        elif run["policy"] == "none" and run["max_tiles"]:
            label = f"{run['max_tiles']} tile{'s' * (run['max_tiles'] > 1)}"
            series, order = "fewer tiles", run["max_tiles"]
        elif run["policy"] == "none":
            series = f"padding tiles {run['tower_tiles']}"
        else:
            # Runs that differ in more than the value of the policy's first option are on other lines.
            usual = next(iter(POLICY_OPTIONS.get(run["policy"], {})), option)
            others = [name for name in run["options"] if name != usual]
            series, order = ", ".join([run["policy"], *others]), float(value or 0)
            if value is not None:
                label = f"{'K' if option == 'k_ratio' else option} = {value:g}"
            if run["kept_sets"] == "question":
                series += ", kept_sets=question"
            if run["max_tiles"]:
                series += f", max_tiles={run['max_tiles']}"
            if run["tower"]:
                series += f", tower {run['tower']}"
    return _Point(run["name"], series, short(label), order, x, y, low, high)


_AROUND = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (7, 5, "left", "bottom"),
    (7, -5, "left", "top"),
    (-7, 5, "right", "bottom"),
    (-7, -5, "right", "top"),
    (0, 14, "center", "bottom"),
    (0, -14, "center", "top"),
    (9, 14, "left", "bottom"),
    (9, -14, "left", "top"),
)


def _label(figure: Figure, axes: Axes, points: Sequence[_Point], series: Iterable[Sequence[_Point]]) -> None:
    """Names each point beside it, where the name covers least of what is drawn."""
    # Asked in display coordinates, so the layout has to stand.
    figure.canvas.draw()
    frame = axes.get_window_extent()
    drawn = [(point.x, y) for point in points for y in (point.low, point.y, point.high)]
    for members in series:
        for one, other in itertools.pairwise(members):
            drawn += [(one.x + (other.x - one.x) * i / 40, one.y + (other.y - one.y) * i / 40) for i in range(40)]
    spots = [axes.transData.transform(place) for place in drawn]
    taken: list[Any] = []
    for point in points:
        best: tuple[float, Annotation | None, Any] = (float("inf"), None, None)
        for dx, dy, ha, va in _AROUND:
            note = axes.annotate(
                point.label, (point.x, point.y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=9
            )
            # The axes stay where they are.
            note.set_in_layout(False)
            box = note.get_window_extent().padded(1)
            covered = 3 * sum(box.overlaps(other) for other in taken) + sum(box.contains(*spot) for spot in spots)
            covered += 5 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if covered < best[0]:
                if best[1] is not None:
                    best[1].remove()
                best = (covered, note, box)
            else:
                note.remove()
        taken.append(best[2])


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
