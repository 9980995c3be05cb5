"""``pareto.md``: tables of quality at equal held bytes, and what they come to in words computed from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from demo.table import row

Report = dict[str, Any]
Point = dict[str, Any]
ALL = "all"
KINDS_AT = 0.15
"""The share at which kinds of questions have a table of their own."""
OFF = 0.01
"""A measured share this far from the reference's is marked."""
NONE = "–"
ARROWS = {"better": " ↑", "worse": " ↓", "not distinguishable": ""}


def markdown(report: Report) -> str:
    lines = [
        "Every policy at equal held bytes, on the demo model: the most bytes of images' keys and values that the engine held "
        "at once, those that questions share counted once, as a share of what it holds with all features. One kept set an "
        "image, or *by question* (hollow). Share of answers that are right as a whole, in %, ± half of its 95 % interval "
        "(bootstrap over images). **Bold**: the best at that share, and what is not distinguishable from it (paired "
        "differences, 95 %). "
        f"↑ ↓: better or worse than {report['reference']} at that share; nothing: not distinguishable.",
        "",
        "![Quality against the most bytes held at once](pareto-kv.svg)",
        "",
        "![Quality against bytes held over time](pareto-byte-seconds.svg)",
        "",
        "![Quality against seconds](pareto-time.svg)",
    ]
    for name, data in report["sets"].items():
        lines += ["", f"## {name}", "", f"{data['rows']:,} questions on {data['images']:,} images.", ""]
        lines += quality(report, data)
        lines += [
            "",
            "Measured: bytes held, most at once and over time, each in % of all features', and milliseconds of prefill and "
            "decoding a question:",
            "",
        ]
        lines += costs(report, data)
        target = min((each["target"] for each in data["fractions"]), key=lambda t: abs(t - KINDS_AT))
        lines += ["", f"By kind of question, with {percent(share_at(data, target))} % held:", ""]
        lines += kinds(report, data, target)
        lines += rivals(report, data)
        lines += ["", *said(report, data)]
    lines += ["", "## Better than the reference", "", *better(report), "", *conditions(report)]
    return "\n".join(lines) + "\n"


# ---- tables -----------------------------------------------------------------------------------------------------------------


def unequal(report: Report, data: Report) -> Iterator[str]:
    if any(mark(data, point) for point in data["points"]):
        yield ""
        yield f"†: measured at more than {OFF:.0%} of the features away from {report['reference']}'s share."


def quality(report: Report, data: Report) -> Iterator[str]:
    full = data["points"][0]
    targets = [each["target"] for each in data["fractions"]]
    yield row(["policy", *(f"{target:g}" for target in targets)])
    yield row(["---", *["---:"] * len(targets)])
    yield row(["all features", *[plus_minus(full["accuracy"][ALL])] * len(targets)])
    for name in [*report["contenders"], "lower resolution"]:
        points = [at(data, name, target) for target in targets]
        if any(points):
            yield row([label(report, name), *(scored(point, ALL) if point else NONE for point in points)])
    yield row([f"held, {report['reference']}", *(percent(each["share"]) for each in data["fractions"])])


def costs(report: Report, data: Report) -> Iterator[str]:
    full = data["points"][0]
    targets = [each["target"] for each in data["fractions"]]
    yield row(["policy", *(f"{target:g}, most · over time · ms" for target in targets)])
    yield row(["---", *["---:"] * len(targets)])
    yield row(["all features", *[f"100.0 · 100.0 · {milliseconds(full)}"] * len(targets)])
    for name in [*report["contenders"], "lower resolution"]:
        points = [at(data, name, target) for target in targets]
        if any(points):
            yield row([label(report, name), *(measured(data, point) if point else NONE for point in points)])
    yield from unequal(report, data)


def kinds(report: Report, data: Report, target: float) -> Iterator[str]:
    names = [kind for kind in data["kinds"] if kind != ALL]
    yield row(["policy", *(f"{name} ({data['kinds'][name]:,})" for name in names)])
    yield row(["---", *["---:"] * len(names)])
    full = data["points"][0]
    yield row(["all features", *(plus_minus(full["accuracy"][kind]) for kind in names)])
    for name in report["contenders"]:
        if point := at(data, name, target):
            yield row([label(report, name), *(scored(point, kind) for kind in names)])


def rivals(report: Report, data: Report) -> Iterator[str]:
    """Fewer tiles and lower resolution beside the reference at their bytes."""
    yield ""
    found = [point for point in data["points"] if point["contender"] in ("fewer tiles", "lower resolution")]
    if not found:
        yield "Its images take one tile each: fewer tiles or a lower resolution can't hold less here."
        return
    yield (
        "Fewer tiles, and images shrunk before they are cut; all features of what is left are kept. The demo model was trained "
        "on scenes at their own resolution, with objects of 28 pixels and more: it has not learnt to see smaller ones."
    )
    yield ""
    yield row(["images", "held", "ms", "right", f"{report['reference']} at", "the images' less its, points"])
    yield row(["---", *["---:"] * 4, "---"])
    for point in sorted(found, key=lambda each: (each["contender"], -each["share"])):
        against = point["against_reference"]
        yield row(
            [
                point["view"],
                percent(point["share"]),
                milliseconds(point),
                plus_minus(point["accuracy"][ALL]),
                percent(against["share"]) + ("" if against["equal_cost"] else " (not equal)"),
                f"{interval(against['kinds'][ALL])}: {against['kinds'][ALL]['verdict']}",
            ]
        )


# ---- in words ---------------------------------------------------------------------------------------------------------------


def said(report: Report, data: Report) -> Iterator[str]:
    """Where a control wins, and which policies are worth more than a control."""
    wins, losses, kind_wins = [], [], []
    policies = [name for name in report["contenders"] if name not in report["controls"]]
    for each in data["fractions"]:
        target, share = each["target"], percent(each["share"])
        for name in policies:
            point = at(data, name, target)
            if point is None:
                continue
            for control, found in point["against_controls"].items():
                if found[ALL]["verdict"] == "worse":
                    wins.append(f"- At {share} % {control} is better than {name}: {interval(opposite(found[ALL]))} points.")
                for kind, difference in found.items():
                    if kind != ALL and difference["verdict"] == "worse":
                        kind_wins.append((share, control, name, kind))
            if not all(found[ALL]["verdict"] == "better" for found in point["against_controls"].values()):
                losses.append((share, name))
    yield "**Where a control wins.** " + ("" if wins else "Nowhere, over all kinds of questions together.")
    if wins:
        yield ""
        yield from wins
    if kind_wins:
        yield ""
        places: dict[tuple[str, str, str], list[str]] = {}
        for share, control, name, kind in kind_wins:
            places.setdefault((control, name, kind), []).append(f"{share} %")
        one = (f"{control} over {name} on {kind} (at {', '.join(at)})" for (control, name, kind), at in places.items())
        yield f"By kind: {'; '.join(one)}."
    yield ""
    by_share: dict[str, list[str]] = {}
    for share, name in losses:
        by_share.setdefault(share, []).append(name)
    listed = "; ".join(f"at {share} %: {', '.join(names)}" for share, names in by_share.items())
    yield f"**Not shown to be worth more than a control** (not better than each of them): {listed or 'none'}."
    yield ""
    yield "**Best as measured** (and how many others are not distinguishable from it): " + "; ".join(
        f"at {percent(each['share'])} % {each['best'][ALL]} ({level(data, each['target'])})" for each in data["fractions"]
    )


def better(report: Report) -> Iterator[str]:
    """What is better than the reference at each target, on how many of the sets."""
    sets = report["sets"]
    for target in report["targets"]:
        verdicts = {}
        for name in report["contenders"]:
            points = {each: at(data, name, target) for each, data in sets.items()}
            if name != report["reference"] and all(points.values()):
                found = {each: point["against_reference"] for each, point in points.items() if point}
                verdicts[name] = [f["kinds"][ALL]["verdict"] if f["equal_cost"] else "at another cost" for f in found.values()]
        everywhere = [name for name, each in verdicts.items() if set(each) == {"better"}]
        somewhere = [
            f"{name} ({', '.join(f'{verdict} on {where}' for verdict, where in zip(each, sets, strict=True))})"
            for name, each in verdicts.items()
            if "better" in each and name not in everywhere
        ]
        line = f"- At {target:g}: "
        line += f"on all sets {', '.join(everywhere)}" if everywhere else "nothing on all sets"
        yield line + (f"; on one alone {', '.join(somewhere)}." if somewhere else ".")


def conditions(report: Report) -> Iterator[str]:
    yield "## Conditions"
    yield ""
    listed = "; ".join(f"{name} {value}" for name, value in report["conditions"].items())
    yield (
        f"{listed}; model {report['model_sha256'][:12]}. Each policy is set to the bytes that {report['reference']} was "
        f"measured to hold at the setting nearest to the share in the column's head: parameters that depend on the data "
        "(trimmed-llama's K, zipvl's mass, all of those by question) were searched for on a part of the data, without a look "
        "at the answers. By question nothing holds less than a feature for each question. think cuts key channels, and can't "
        "fall below half. Verdicts are not corrected for their number: one difference in twenty that is none looks like one."
    )
    yield ""
    yield (
        "Seconds are the engine's own, in fp32 on a CPU, for a model of 4.7 M parameters and answers of a few tokens: prefill, "
        "which also selects, and decoding. What selecting costs shows here as it would not on a large model, and what fewer "
        "bytes save hardly does. The tower is apart, as it does the same for all policies: "
        + "; ".join(
            f"{name} {', '.join(f'{view} {ms:.1f} ms an image' for view, ms in data['tower_ms_per_image'].items())}"
            for name, data in report["sets"].items()
        )
        + ". An image's features and its first layer's keys and values are there before a policy's turn, as the engine keeps "
        "them for further questions; policies took turns in blocks of each set, in another order each time. Milliseconds are "
        f"the median block's; a policy's fastest and slowest block are {spread(report):.0%} of it apart (median over all)."
    )


def spread(report: Report) -> float:
    """How far a policy's blocks are apart in time, median over all policies and sets."""
    taken = [point["ms_per_row"] for data in report["sets"].values() for point in data["points"]]
    return statistics.median((max(each["blocks"]) - min(each["blocks"])) / each["both"] for each in taken)


# ---- cells ------------------------------------------------------------------------------------------------------------------


def at(data: Report, contender: str, target: float) -> Point | None:
    found = (point for point in data["points"] if point["contender"] == contender and point["target"] == target)
    return next(found, None)


def share_at(data: Report, target: float) -> float:
    return next(float(each["share"]) for each in data["fractions"] if each["target"] == target)


def level(data: Report, target: float) -> int:
    """How many are not distinguishable from the best at ``target``."""
    here = [point for point in data["points"] if point["target"] == target]
    return sum(point["against_best"][ALL]["verdict"] != "worse" for point in here) - 1


def label(report: Report, name: str) -> str:
    return f"{name} (control)" if name in report["controls"] else name


def scored(point: Point, kind: str) -> str:
    """Accuracy with its interval; bold where nothing is shown to be better."""
    text = plus_minus(point["accuracy"][kind])
    if point["against_best"][kind]["verdict"] != "worse":
        text = f"**{text}**"
    against = point.get("against_reference")
    if against is None:
        return text
    return text + ("" if against["equal_cost"] else " †") + ARROWS[against["kinds"][kind]["verdict"]]


def measured(data: Report, point: Point) -> str:
    over_time = point["held_byte_seconds_per_row"] / data["points"][0]["held_byte_seconds_per_row"]
    return f"{percent(point['share'])}{mark(data, point)} · {percent(over_time)} · {milliseconds(point)}"


def mark(data: Report, point: Point) -> str:
    if point["target"] is None:
        return ""
    return " †" if abs(point["share"] - share_at(data, point["target"])) > OFF else ""


def plus_minus(found: Report) -> str:
    half = None if found["low"] is None else (found["high"] - found["low"]) / 2
    return percent(found["value"]) + ("" if half is None else f" ± {percent(half)}")


def interval(found: Report) -> str:
    """A difference in points, with its interval."""
    value = f"{100 * found['value']:+.1f}"
    if found["low"] is not None:
        value += f" ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
    return value.replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def opposite(found: Report) -> Report:
    ends = (None, None) if found["low"] is None else (-found["high"], -found["low"])
    return {"value": -found["value"], "low": ends[0], "high": ends[1]}


def milliseconds(point: Point) -> str:
    return f"{point['ms_per_row']['both']:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"
