"""``pareto.md``: tables of quality at equal held bytes, and what they come to in words computed from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.pareto_contenders import CLOSE, FEWER
from benchmarks.pareto_scores import ALL
from benchmarks.pareto_speed_page import ABOUT, speed
from benchmarks.pareto_words import Point, Report, interval, percent, plus_minus
from demo.table import row

KINDS_AT = 0.15
"""The share at which kinds of questions have a table of their own."""
NONE = "–"
ARROWS = {"better": " ↑", "worse": " ↓", "not distinguishable": ""}


def markdown(report: Report) -> str:
    lines = [
        "Every policy at equal held bytes, on the demo models: the most bytes of images' keys and values that the engine held "
        "at once, those that questions share counted once, as a share of what it holds with all features. One kept set an "
        "image, or *by question* (hollow). Share of answers that are right as a whole, in %, ± half of its 95 % interval "
        "(bootstrap over images). **Bold**: the best at that share, and what is not distinguishable from it (paired "
        "differences, 95 %). "
        f"↑ ↓: better or worse than {report['reference']} at that share; nothing: not distinguishable. †: what it held is more "
        f"than {CLOSE:.0%} of all features away from {report['reference']}'s, so that the two are not compared.",
        "",
        "![Quality against the most bytes held at once](pareto-kv.svg)",
        "",
        "![Quality against bytes held over time](pareto-byte-seconds.svg)",
        "",
        "![Quality against seconds](pareto-time.svg)",
        "",
        ABOUT,
        "",
        "![Quality against images a second, end to end](pareto-speed.svg)",
        "",
        "![Quality against the most bytes held at once, by ways through the tower](pareto-tower-kv.svg)",
    ]
    for name, data in report["sets"].items():
        lines += ["", f"## {name}", "", f"{data['rows']:,} questions on {data['images']:,} images.", ""]
        lines += quality(report, data)
        lines += [
            "",
            "Measured: bytes held, most at once and over time, each in % of all features', and milliseconds of prefill and "
            "decoding a question (median block):",
            "",
        ]
        lines += costs(report, data)
        target = min((each["target"] for each in data["fractions"]), key=lambda t: abs(t - KINDS_AT))
        lines += ["", f"By kind of question, with {percent(share_at(data, target))} % held:", ""]
        lines += kinds(report, data, target)
        lines += rivals(report, data)
        lines += ["", *said(report, data)]
        lines += ["", f"### End to end: {name}", "", *speed(data)]
    lines += ["", "## Better than the reference", "", *better(report), "", *conditions(report)]
    return "\n".join(lines) + "\n"


# ---- tables -----------------------------------------------------------------------------------------------------------------


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
    found = [point for point in data["points"] if point["contender"] in (FEWER, "lower resolution")]
    if not found:
        yield "Its images take one tile each: fewer tiles or a lower resolution can't hold less here."
        return
    yield (
        "Fewer tiles, and images shrunk before they are cut; all features of what is left are kept. The demo models were "
        "trained on scenes at their own resolution: they have not learnt to see smaller objects."
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
    targets = [each["target"] for each in data["fractions"]]
    # By policy and target, of those that held as much as the reference.
    policies = {
        name: {target: point for target in targets if (point := at(data, name, target)) and compared(point)}
        for name in report["contenders"]
        if name not in report["controls"]
    }
    leads = {name: [lead(points.get(target), ALL) for target in targets] for name, points in policies.items()}
    wins = list(filled([f"{target:g}" for target in targets], leads))
    yield "**Where a control wins**, and by how many points" + (":" if wins else ": nowhere, over all kinds together.")
    yield from wins
    kinds = [kind for kind in data["kinds"] if kind != ALL]
    shares = {
        name: [", ".join(f"{target:g}" for target, point in points.items() if lead(point, kind)) for kind in kinds]
        for name, points in policies.items()
    }
    if kind_wins := list(filled(kinds, shares)):
        yield ""
        yield "By kind of question, the shares at which a control wins:"
        yield from kind_wins
    yield ""
    listed = "; ".join(f"at {target:g}: {', '.join(names)}" for target in targets if (names := no_better(policies, target)))
    yield f"**Not shown to be worth more than a control** (not better than each of them): {listed or 'none'}."
    yield ""
    yield "**Best as measured** (and how many others are not distinguishable from it): " + "; ".join(
        f"at {each['target']:g} {each['best'][ALL]} ({level(data, each['target'])})" for each in data["fractions"]
    )


def filled(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A table of those lines, by policy, in which anything stands; nothing where there is none."""
    lines = {name: cells for name, cells in lines.items() if any(cells)}
    if lines:
        yield ""
        yield row(["policy", *columns])
        yield row(["---", *["---"] * len(columns)])
    for name, cells in lines.items():
        yield row([name, *(cell or NONE for cell in cells)])


def lead(point: Point | None, kind: str) -> str:
    """By how much the controls that are better than ``point`` are so; empty if none is."""
    found = point["against_controls"] if point else {}
    worse = {control: each[kind] for control, each in found.items() if each[kind]["verdict"] == "worse"}
    return ", ".join(f"{control} {interval(opposite(each))}" for control, each in worse.items())


def no_better(policies: dict[str, dict[float, Point]], target: float) -> list[str]:
    """Those that are not better than each control at ``target``."""
    there = {name: points[target]["against_controls"] for name, points in policies.items() if target in points}
    return [name for name, found in there.items() if not all(each[ALL]["verdict"] == "better" for each in found.values())]


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
        yield line + (f"; on some {', '.join(somewhere)}." if somewhere else ".")


def conditions(report: Report) -> Iterator[str]:
    yield "## Conditions"
    yield ""
    sets = list(report["sets"].values())
    listed = "; ".join(f"{name} {value}" for name, value in report["conditions"].items())
    models = ", ".join(f"{name} by model {data['model_sha256'][:12]}" for name, data in report["sets"].items())
    yield (
        f"{listed}; {models}. Verdicts are not corrected for their number: one difference in twenty that is none looks like "
        "one."
    )
    yield ""
    yield (
        f"At equal held bytes each policy is set to the bytes that {report['reference']} was "
        "measured to hold at the setting nearest to the share in the column's head: parameters that depend on the data "
        "(trimmed-llama's K, zipvl's mass, all of those by question) were searched for, without a look at the answers. By "
        "question nothing holds less than a feature for each question. think cuts key channels, and can't fall below half. "
        "Seconds are the engine's own, in fp32 on a CPU, for models of some 5 M parameters and answers of a few tokens: "
        "prefill, which also selects, and decoding. What selecting costs shows here as it would not on a large model, and what "
        "fewer bytes save hardly does. The tower is apart, as it does the same for all policies: "
        + "; ".join(
            f"{name} {', '.join(f'{view} {ms:.1f} ms an image' for view, ms in data['tower_ms_per_image'].items())}"
            for name, data in report["sets"].items()
        )
        + ". An image's features are there before a policy's turn, as the engine keeps them for further questions; policies "
        "took turns in blocks of each set, in another order each time. A policy's fastest and slowest block are "
        f"{spread([point['ms_per_row']['blocks'] for data in sets for point in data['points']])} of its median apart (median "
        "over all)."
    )
    yield ""
    end_to_end = [point["seconds"] for data in sets for point in data["end_to_end"]["points"]]
    yield (
        "End to end all ways take their turns in each block, one after the other, three times, each time in another order. A "
        f"way's fastest and slowest block are {spread(end_to_end)} of its median apart."
    )


def spread(taken: Sequence[Sequence[float]]) -> str:
    """How far blocks are apart in time, median over all that took them."""
    return f"{statistics.median((max(each) - min(each)) / statistics.median(each) for each in taken):.0%}"


# ---- cells ------------------------------------------------------------------------------------------------------------------


def at(data: Report, contender: str, target: float) -> Point | None:
    found = (point for point in data["points"] if point["contender"] == contender and point["target"] == target)
    return next(found, None)


def compared(point: Point) -> bool:
    """Whether it held as much as the reference at its target, and is compared with what else did."""
    return "against_best" in point


def share_at(data: Report, target: float) -> float:
    return next(float(each["share"]) for each in data["fractions"] if each["target"] == target)


def level(data: Report, target: float) -> int:
    """How many are not distinguishable from the best at ``target``, of those that held as much as the reference."""
    here = [point for point in data["points"] if point["target"] == target and compared(point)]
    return sum(point["against_best"][ALL]["verdict"] != "worse" for point in here) - 1


def label(report: Report, name: str) -> str:
    return f"{name} (control)" if name in report["controls"] else name


def scored(point: Point, kind: str) -> str:
    """Accuracy with its interval; bold where nothing is shown to be better at equal bytes."""
    text = plus_minus(point["accuracy"][kind])
    if not compared(point):
        return f"{text} †"
    if point["against_best"][kind]["verdict"] != "worse":
        text = f"**{text}**"
    against = point.get("against_reference")
    return text + (ARROWS[against["kinds"][kind]["verdict"]] if against else "")


def measured(data: Report, point: Point) -> str:
    over_time = point["held_byte_seconds_per_row"] / data["points"][0]["held_byte_seconds_per_row"]
    return f"{percent(point['share'])} · {percent(over_time)} · {milliseconds(point)}"


def opposite(found: Report) -> Report:
    ends = (None, None) if found["low"] is None else (-found["high"], -found["low"])
    return {"value": -found["value"], "low": ends[0], "high": ends[1]}


def milliseconds(point: Point) -> str:
    return f"{point['ms_per_row']['both']:.2f}"
