"""A calibration on a page: the table, the curve, and the configuration of the K that was chosen."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from jobs.calibration.bound import lower_bound, size_that_would_show
from jobs.calibration.run import ROWS_AT_ONCE, Calibration, Point, Spent, Target
from jobs.report import HOLDS_MORE, MORE, count, size

MEASURES = {
    "exact": "texts that are equal",
    "edit_similarity": "token-level edit similarity",
    "chrf": "chrF",
}


def verdict(found: Calibration) -> str:
    """What was found, in one or two sentences."""
    target = found.target
    asked = _asked(target)
    behind = "" if found.tower is None else f"Behind a tower trimmed by {found.tower}, "
    if found.chosen is not None:
        (point,) = (p for p in found.points if p.k_ratio == found.chosen)
        return (
            f"{behind}{_named(point, found)} is the smallest that holds {asked}: {point.agreement:.2%} measured, at least "
            f"{point.at_least:.2%}; it keeps {point.keep_fraction:.1%} of the features{_held(point.spent)}."
        )
    if (small := too_small(target, found.rows, found.effective_rows)) is not None:
        return small
    best = max(found.points, key=lambda p: p.at_least or 0.0)
    more = "try larger K" if found.tower is None else "leave more of the tower"
    return (
        f"{behind + 'no' if behind else 'No'} K holds {asked}: the best, {_named(best, found)}, agrees in "
        f"{best.agreement or 0:.2%}, at least {best.at_least or 0:.2%}. Lower the target, {more}, take a larger sample, or "
        "keep all features."
    )


def _named(point: Point, found: Calibration) -> str:
    return f"K = {point.k_ratio:g}" + (" (all that it leaves)" if found.tower and point.k_ratio == 1 else "")


def too_small(target: Target, rows: int, effective: float) -> str | None:
    """What a sample of ``rows``, worth ``effective`` independent ones, lacks to show ``target``; None where it has enough."""
    needed = size_that_would_show(target.agreement, target.confidence)
    if effective >= needed:
        return None
    most = lower_bound(1.0, effective, target.confidence) if effective else 0.0
    alike = effective < rows
    worth = f" are worth {effective:,.0f} independent ones, which" if alike else ""
    could = f"rows worth {needed:,}" if alike else f"{needed:,} rows"
    return (
        f"The sample is too small for {_asked(target)}: its {count(rows, 'row')}{worth} show no more than {most:.2%} even if "
        f"all agree; {could} could show it. Take more, or lower the target."
    )


def _asked(target: Target) -> str:
    return f"{target.agreement:.2%} agreement ({MEASURES[target.measure]}) at {target.confidence:.0%} confidence"


def _held(spent: Spent) -> str:
    return "" if spent.of_full is None else f", and held {spent.of_full:.2f} × the cross KV that all would have"


def markdown(found: Calibration, conditions: Mapping[str, str], curve: str) -> str:
    """The page; ``curve`` is the picture's name beside it."""
    target, full = found.target, found.full
    towers = f"{full.tower_seconds:.1f} s"
    if found.tower is not None:
        towers += f", through the trimmed tower {sum(point.spent.tower_seconds for point in found.points):.1f} s"
    lines = [
        "# Which K holds",
        "",
        verdict(found),
        "",
        f"![Agreement with all features against K and kept features]({curve})",
        "",
        "| K | cross KV held, most | held over time | prefill and decoding | features kept | agreement "
        f"| at least, {target.confidence:.0%} | holds {target.agreement:.2%} | a row's own cache |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        f"| all | {size(full.peak_bytes)} | {_times(full.of_full)} | 1.00 × | 100.0% | | | | {size(full.own_bytes)} |",
        *(_row(point, found) for point in found.points),
        "",
        *(f"- **{name}**: {said}" for name, said in conditions.items()),
        f"- **Agreement** is with the answers of all features, row by row: {MEASURES[target.measure]}. **At least**: "
        "Chernoff's bound (Hoeffding 1963, theorem 1), answers about one image counted as if they were one "
        f"({count(found.rows, 'row')} worth {found.effective_rows:,.0f}). K is taken from the largest downwards, to the first "
        "that fails, so that trying several does not make a wrong choice likelier.",
        "- **Cross KV held**: images' keys and values in the machine, what rows share counted once. Most: at once, by an actor "
        f"that had {ROWS_AT_ONCE} rows to run, or one image's where that has more; a job runs as many as memory allows. Over "
        "time: bytes × seconds, beside what all features of the same rows would have held in that time (by formula).",
        "- **Prefill and decoding**: seconds of the sample beside all features' own. It is for comparison: images went "
        f"through each tower once for all runs ({towers}, beside {full.generation_seconds:.1f} s); a run's batches are larger.",
        "- **A row's own cache**: as if no other row shared it.",
    ]
    lines += [
        f"- **WARNING**: K = {point.k_ratio:g} {HOLDS_MORE.format(times=_times(point.spent.of_full))}."
        for point in found.points
        if (point.spent.of_full or 0.0) > MORE
    ]
    if found.times_one_run is not None:
        lines.append(
            f"- **Cost**: the device's seconds were {found.times_one_run:.2f} times those of the sample's run with all "
            "features alone."
        )
    if any(point.given_up for point in found.points):
        lines.append("- **Given up**: a K that could no longer hold, even if all that was left agreed, got no more rows.")
    if found.errors:
        lines.append(f"- **Errors**: {count(found.errors, 'row')} of {found.rows:,} could not be answered and are left out.")
    return "\n".join(lines) + "\n"


def _peak_of_full(point: Point, found: Calibration) -> float | None:
    """None where it had fewer rows to run, as it was given up. Not a matter of K alone: rows ran at once as they arrived."""
    peak = found.full.peak_bytes
    return point.spent.peak_bytes / peak if peak and not point.given_up else None


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} ×"


def _row(point: Point, found: Calibration) -> str:
    known = point.agreement is not None and point.at_least is not None
    spent, seconds, peak = point.spent, found.full.generation_seconds, _peak_of_full(point, found)
    cells = [
        (f"**{point.k_ratio:g}**" if point.k_ratio == found.chosen else f"{point.k_ratio:g}")
        + (", the tower alone" if found.tower and point.k_ratio == 1 else ""),
        size(spent.peak_bytes) + ("" if peak is None else f", {_times(peak)}"),
        _times(spent.of_full),
        _times(spent.generation_seconds / seconds if seconds and not point.given_up else None),
        "–" if point.keep_fraction is None else f"{point.keep_fraction:.1%}",
        f"{point.agreement:.2%}" if known else "–",
        f"{point.at_least:.2%}" if known else "–",
        "yes" if point.holds else f"given up after {point.rows:,}" if point.given_up else "no",
        size(spent.own_bytes),
    ]
    return f"| {' | '.join(cells)} |"


def curve(found: Calibration) -> bytes:
    """Agreement against K, with its bound and the target, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    points = [p for p in found.points if p.agreement is not None]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "calibration", "font.family": "sans-serif", "font.size": 10}
    with pyplot.rc_context(settings):  # type: ignore[arg-type]
        figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
        ks = [p.k_ratio for p in points]
        axes.fill_between(
            ks, [p.at_least or 0 for p in points], [p.agreement or 0 for p in points], color="#0072b2", alpha=0.2, lw=0
        )
        axes.plot(ks, [p.agreement or 0 for p in points], color="#0072b2", marker="o")
        for p in points:
            kept = "" if p.keep_fraction is None else f"{p.keep_fraction:.0%} kept"
            axes.annotate(
                kept, (p.k_ratio, p.agreement or 0), (0, 7), textcoords="offset points", ha="center", fontsize=8, color="#444"
            )
        axes.axhline(found.target.agreement, color="#d55e00", lw=1.2, ls="--")
        axes.annotate(
            f"target {found.target.agreement:.2%}", (1, found.target.agreement), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color="#d55e00", fontsize=9,
        )  # fmt: skip
        for p in points:
            if p.k_ratio == found.chosen:
                axes.plot([p.k_ratio], [p.agreement or 0], marker="o", ms=11, mfc="none", mec="#000", ls="")
        axes.set_xscale("log")
        axes.set_xticks(ks, [f"{k:g}" for k in ks])
        axes.minorticks_off()
        axes.set_xlabel("K, share of the features that each head picks")
        axes.set_ylabel(f"agreement with all features; band: at least, {found.target.confidence:.0%}")
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=None))
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return out.getvalue()


def configuration(found: Calibration, options: Mapping[str, Any]) -> str:
    """YAML for ``--config`` of ``jobs.answer`` or ``jobs.caption``: ``options``, with the chosen K."""
    import yaml

    head = f"# {verdict(found)}\n"
    policy = {"policy": "none"} if found.chosen == 1 else {"policy": "trimmed-llama", "k_ratio": found.chosen}
    return head + yaml.safe_dump({**options, **policy}, sort_keys=False)
