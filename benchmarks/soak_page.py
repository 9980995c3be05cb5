"""From ``soak.json`` to ``soak.md``: every hit that a job took, and what was lost by them."""

from __future__ import annotations

from typing import Any

from benchmarks.page import row

ZEROS = {"lost": "rows lost", "doubled": "rows twice", "torn": "torn files", "errors": "rows with an error"}


def markdown(measured: dict[str, Any]) -> str:
    """The page."""
    lines = [*_totals(measured["runs"]), "", *_hits(measured["runs"]), "", *_notes(measured)]
    return "\n".join(lines) + "\n"


def _totals(runs: list[dict[str, Any]]) -> list[str]:
    heads = ["", "hits", "rows asked", "rows written", *ZEROS.values(), "texts unlike the quiet run's", "seconds, quiet", "hit"]
    lines = [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
    for run in runs:
        cells = [run["name"], len(run["hits"]), f"{run['asked']:,}", f"{run['written']:,}"]
        cells += [f"**{run[name]}**" for name in ZEROS]
        cells += ["" if run["unlike"] is None else run["unlike"], f"{run['quiet_seconds']:.0f}", f"{run['seconds']:.0f}"]
        lines.append(row([str(cell) for cell in cells]))
    return lines


def _hits(runs: list[dict[str, Any]]) -> list[str]:
    heads = ["", "hit", "while", "seconds after its start", "rows on disk", "seconds until more were"]
    lines = [row(heads), row(["---:", "---", "---", "---:", "---:", "---:"])]
    number = 0
    for run in runs:
        for hit in run["hits"]:
            number += 1
            more = "none were left" if hit["continued_seconds"] is None else f"{hit['continued_seconds']:.1f}"
            cells = [number, f"{run['name']}: {hit['what']}", hit["stage"], f"{hit['after_seconds']:.1f}", f"{hit['rows']:,}"]
            lines.append(row([*(str(cell) for cell in cells), more]))
    return lines


def _notes(measured: dict[str, Any]) -> list[str]:
    there, job = measured["conditions"], measured["job"]
    lines = [
        f"- **Machine**: {there['hardware']}, {there['cores']} cores; ray {there['versions']['ray']}, Python "
        f"{there['versions']['python']}; commit {there['commit']}.",
        f"- **Job**: `python -m jobs.answer`, {job['rows']:,} questions in {job['units']} units, the demo model. A driver is "
        "killed with SIGKILL, with whatever Ray it had, and the same command started again; an actor with SIGKILL too, and "
        f"the job left alone. Moments are drawn at random over a job's life, seed {measured['seed']}.",
        "- **Zeros**: ids of the output against ids of the input; after each hit on a driver and at the end, every file under "
        "its final name is read whole and has its unit's rows.",
        "- **Seconds until more were**: from the hit to the next file under its final name, restarts that were killed "
        "meanwhile included. On S3 whoever comes next first waits the killed run's lease out, 45 seconds.",
    ]
    if measured["left_out"]:
        lines.append(f"- **Left out**: {'; '.join(measured['left_out'])}.")
    return lines
