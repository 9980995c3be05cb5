"""From finished cells to ``pareto.json``: accuracies with their intervals, paired differences, held bytes and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.pareto_bench import Cell
from benchmarks.pareto_contenders import CLOSE, CONTENDERS, REFERENCE, TARGETS, Way
from benchmarks.pareto_run import Entry, Study
from benchmarks.pareto_scores import Result, Scores
from benchmarks.pareto_speed import end_to_end
from demo.shards import Row
from demo.table import conditions, sha256


def result(plans: Sequence[tuple[Study, Sequence[Entry], Sequence[Way]]], say: Callable[[str], None]) -> Result:
    """The contents of ``pareto.json``."""
    sets = {}
    for study, entries, ways in plans:
        say(f"{study.data.name}: intervals")
        points = [point(entry, study.cells(entry)) for entry in entries]
        sets[study.data.name] = {
            **compared(points, study.data.rows),
            "tower_ms_per_image": towers(study, entries),
            "end_to_end": end_to_end(ways, study.cells_of_ways(ways), study.data.rows),
            "model_sha256": sha256(study.bench.weights),
        }
    report = {
        "targets": list(TARGETS),
        "reference": REFERENCE,
        "contenders": [each.name for each in CONTENDERS],
        "controls": [each.name for each in CONTENDERS if each.control],
        "conditions": conditions() | {"blocks": plans[0][0].data.blocks},
        "sets": sets,
    }
    return {name: rounded(part) for name, part in report.items()}


def towers(study: Study, entries: Sequence[Entry]) -> Result:
    """The tower's milliseconds for an image, by what images come as."""
    views = dict.fromkeys(entry.view for entry in entries)
    return {view.name: 1000 * study.tower_seconds(view) for view in views}


def point(entry: Entry, cells: Sequence[Cell]) -> Result:
    """One entry's numbers, with ``right`` row by row in the order of the blocks."""
    rows = sum(cell["rows"] for cell in cells)
    by_block = [1000 * (cell["prefill"] + cell["decode"]) / cell["rows"] for cell in cells]
    seconds = {name: sum(cell[name] for cell in cells) for name in ("prefill", "decode")}
    return {
        "contender": entry.contender,
        "target": entry.target,
        "parameter": entry.parameter,
        "policy": repr(entry.policy),
        "view": entry.view.name,
        "max_tiles": entry.view.max_tiles,
        "scale": entry.view.scale,
        "sought_share": entry.share,
        "kept_sets": entry.kept_sets,
        "held_bytes": statistics.mean(cell["held_bytes"] for cell in cells),
        "held_byte_seconds_per_row": sum(cell["held_byte_seconds"] for cell in cells) / rows,
        "output_tokens": sum(cell["output_tokens"] for cell in cells),
        "ms_per_row": {
            **{name: 1000 * value / rows for name, value in seconds.items()},
            # What else ran on the machine during one block does not count.
            "both": statistics.median(by_block),
            "blocks": by_block,
        },
        "right": "".join(cell["right"] for cell in cells),
    }


def held_equally(one: Result, other: Result) -> bool:
    return bool(abs(one["share"] - other["share"]) <= CLOSE)


def compared(points: list[Result], rows: Sequence[Row]) -> Result:
    """A data set's numbers from those of its points, the first of which keeps everything at the images' own resolution.

    Each point gets its accuracy by kind; what is to be compared is compared pair by pair, row for row: each with the reference,
    and at every target, among those that held as much as the reference, with each control and with the best.
    """
    scores = Scores(rows)
    right = [scores.right(point.pop("right")) for point in points]

    full = points[0]["held_bytes"]
    for one, values in zip(points, right, strict=True):
        one["share"] = one["held_bytes"] / full
        one["accuracy"] = scores.share(values)

    def against(one: int, other: int) -> Result:
        return scores.less(right[one], right[other])

    fractions = []
    for target in sorted({one["target"] for one in points if one["target"] is not None}, reverse=True):
        here = {one["contender"]: number for number, one in enumerate(points) if one["target"] == target}
        reference = points[here[REFERENCE]]
        equal = {name: number for name, number in here.items() if held_equally(points[number], reference)}
        best = {k: max(equal.values(), key=lambda n, k=k: points[n]["accuracy"][k]["value"]) for k in scores.masks}  # type: ignore[misc]
        for number in equal.values():
            one = points[number]
            others = [name for name in controls() if name in equal and name != one["contender"]]
            one["against_controls"] = {name: against(number, equal[name]) for name in others}
            one["against_best"] = {kind: scores.less_in(kind, right[number], right[best[kind]]) for kind in scores.masks}
        best_names = {kind: points[number]["contender"] for kind, number in best.items()}
        fractions.append({"target": target, "share": reference["share"], "best": best_names})
    references = [number for number, one in enumerate(points) if one["contender"] == REFERENCE]
    for number, one in enumerate(points):
        if number in references:
            continue
        same = [n for n in references if one["target"] is not None and points[n]["target"] == one["target"]]
        near = min(same or references, key=lambda n: abs(points[n]["share"] - one["share"]))
        if one["contender"] != "all features":
            one["against_reference"] = {
                "share": points[near]["share"],
                "equal_cost": held_equally(one, points[near]),
                "kinds": against(number, near),
            }
    for number in references:
        points[number]["against_all_features"] = against(number, 0)
    return {
        "rows": len(rows),
        "images": len({row.path for row in rows}),
        "kinds": {kind: int(mask.sum()) for kind, mask in scores.masks.items()},
        "fractions": fractions,
        "points": points,
    }


def rounded(value: Any) -> Any:
    """Floats to six digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def controls() -> list[str]:
    return [each.name for each in CONTENDERS if each.control]
