"""From ``scale.json`` to ``scale.md``: what a row costs around the model, with the goals beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.page import row
from benchmarks.scale_run import LAST_ROWS, POINTS, WARM_ROWS

FLAT = 0.2
"""Most by which a further row's cost may differ, between sizes and between a run's beginning and its end."""
FEW = 10_000
"""Rows up to which a run is over so soon that it is taken ``REPEATS`` times."""
REPEATS = 3
DRIVER_GIB = 1.5
BUSY = 0.95


def markdown(measured: dict[str, Any]) -> str:
    """The page."""
    lines = [*_goals(measured), "", *_sizes(measured["sizes"]), "", *_notes(measured)]
    return "\n".join(lines) + "\n"


def spread(costs: Sequence[float]) -> float:
    """By what share the dearest exceeds the cheapest."""
    return max(costs) / min(costs) - 1


def _goals(measured: dict[str, Any]) -> list[str]:
    sizes, paced = measured["sizes"], measured["paced"]
    lines = [row(["", "goal", "measured"]), row(["---", "---:", "---:"])]
    settled = [size for size in sizes if size["row_seconds"] is not None]
    if len(sizes) > 2:
        steps = ", ".join(f"{size['rows']:,}" for size in sizes)
        what = f"cost of a row from size to size ({steps}), dearest step over cheapest"
        lines.append(row([what, f"≤ +{FLAT:.0%}", f"**+{spread(_between(sizes)):.0%}**"]))
    if settled and settled[-1]["row_seconds_last_tenth"] is not None:
        most = settled[-1]
        share = most["row_seconds_last_tenth"] / most["row_seconds_first_tenth"] - 1
        what = f"cost of a further row, last tenth of {most['rows']:,} rows over the first tenth"
        lines.append(row([what, f"≤ +{FLAT:.0%}", f"**{share:+.0%}**"]))
    if sizes:
        most = max(size["driver_peak_bytes"] - size["driver_start_bytes"] for size in sizes) / 2**30
        lines.append(row(["driver's memory, start-up apart", f"< {DRIVER_GIB} GiB", f"**{most:.2f} GiB**"]))
    if paced and paced["busy"] is not None:
        what = f"engine of {paced['batch_seconds'] * 1000:.0f} ms a batch of {paced['batch_rows']}, busy after the first minute"
        lines.append(row([what, f"≥ {BUSY:.0%}", f"**{paced['busy']:.1%}**"]))
    return lines


def _sizes(sizes: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        ["rows", *(f"{size['rows']:,}" for size in sizes)],
        ["---", *("---:" for _ in sizes)],
        ["units", *(f"{size['units']:,}" for size in sizes)],
        ["µs a further row", *(_micros(size["row_seconds"]) for size in sizes)],
        ["  in the first tenth", *(_micros(size["row_seconds_first_tenth"]) for size in sizes)],
        ["  in the last tenth", *(_micros(size["row_seconds_last_tenth"]) for size in sizes)],
        ["  from the size before", "", *(_micros(cost) for cost in _between(sizes))],
        ["start-up by the same line, s", *(_seconds(size["startup_seconds"]) for size in sizes)],
        ["whole run, start-up and all: rows/s, first file to last", *(f"{size['rows_per_second']:,.0f}" for size in sizes)],
        ["ms a unit, first file to last", *(f"{size['seconds_per_unit'] * 1000:.1f}" for size in sizes)],
        ["CPU ms a unit, all processes", *(f"{size['cpu_seconds_per_unit'] * 1000:.1f}" for size in sizes)],
        ["  the driver's", *(f"{size['driver_cpu_seconds_per_unit'] * 1000:.1f}" for size in sizes)],
        ["others' share of the cores", *(f"{size['others_share']:.0%}" for size in sizes)],
        ["planning, s", *(f"{size['plan_seconds']:.1f}" for size in sizes)],
        ["first file after planning, s", *(f"{size['first_row_seconds']:.1f}" for size in sizes)],
        ["  in the first run of 1,000 rows", *(f"{size['first_run_first_row_seconds']:.1f}" for size in sizes)],
        ["driver's memory after start-up, MiB", *(_mib(size["driver_start_bytes"]) for size in sizes)],
        ["driver's memory, most, MiB", *(_mib(size["driver_peak_bytes"]) for size in sizes)],
        ["bytes through the object store an image", *(f"{_through(size):,.0f}" for size in sizes)],
        ["  read: image, question, id", *(f"{size['block_bytes_read_per_image']:,.0f}" for size in sizes)],
        ["  answered", *(f"{size['block_bytes_answered_per_image']:,.0f}" for size in sizes)],
        ["  beside: the image's file", *(f"{size['image_bytes']:,.0f}" for size in sizes)],
    ]
    return [row(line) for line in lines]


def _through(size: dict[str, Any]) -> float:
    found: float = size["block_bytes_read_per_image"] + size["block_bytes_answered_per_image"]
    return found


def _notes(measured: dict[str, Any]) -> list[str]:
    there, paced = measured["conditions"], measured["paced"]
    versions = there["versions"]
    lines = [
        f"- **Machine**: {there['hardware']}, {there['cores']} cores, for driver, Ray, reads, one actor and writes together; "
        f"ray {versions['ray']}, pyarrow {versions['pyarrow']}, Python {versions['python']}; commit {there['commit']}.",
        "- **Run**: 64 × 64 JPEG images in local shards of 10,000 rows, row groups of 250, `--unit-rows 256`; one actor that "
        "does what `pipeline.actor.Answerer` does, but for decoding images, tokenizing and the engine, and answers at once. "
        "Each run in a process and a Ray of its own, after a first run of 1,000 rows, for which Ray starts its workers; each "
        "id came out once. Nothing is read before the actor is up, as those rows would then seem cheap. Up to "
        f"{FEW:,} rows: the median of {REPEATS} runs.",
        f"- **Cost of a further row**: the slope of a run's seconds over its rows, without the first {WARM_ROWS:,} and the "
        f"last {LAST_ROWS:,}, at up to {POINTS} moments at which units' files were written, by Theil and Sen (the median of "
        "all pairs' slopes); start-up is where that line begins, from planning's end on. From the size before: the rows "
        "between two sizes, by the moments of their last files: a start, which each run has once, cancels out. A run of "
        f"{FEW:,} rows is over before Ray's workers have all started, so its own slope is a start's.",
        "- **CPU** of the driver and of all of Ray, from the first file to the last; others' is what else ran on the machine "
        "meanwhile.",
        "- **Memory** is the driver process's resident set; after start-up is after that first run.",
        "- **Object store**: the sizes of the blocks that the reader and the actor put there, each put once and fetched once. "
        "Blocks under 100 KiB Ray keeps in the driver instead.",
    ]
    if paced:
        lines.append(
            f"- **Busy**: {paced['rows']:,} rows, {paced['batches']:,} batches; from {paced['settled_seconds']:.0f} s after "
            "the first batch's start to the last batch's end."
        )
    if measured["left_out"]:
        lines.append(f"- **Left out**, for want of time: {', '.join(f'{rows:,}' for rows in measured['left_out'])} rows.")
    return lines


def _between(sizes: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds a row of each size but the first, the rows of the size before it apart."""
    ends = [size["first_row_seconds"] + size["seconds"] for size in sizes]
    return [
        (end - before) / (size["rows"] - other["rows"])
        for (before, end), (other, size) in zip(pairwise(ends), pairwise(sizes), strict=True)
    ]


def _micros(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f}"
