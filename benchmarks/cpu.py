"""Measure the engine against the recipe users have today: ``python -m benchmarks.cpu --output benchmarks/results``.

One process, all contenders in turns, three quarters of an hour on two cores. Writes ``cpu.json``, ``cpu.md`` and
``cpu-decode.svg``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.amounts import QUICK, Amounts

OPTIONS = (
    ("captions", int, "captioning images"),
    ("questions", int, "images with five questions each"),
    ("rounds", int, "passes of every contender, at most"),
    ("minutes", float, "no round begins after which the whole would take longer than this"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    for name, kind, what in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"{what}; default: {getattr(Amounts(), name)}")
    parser.add_argument("--without-ray", action="store_true", help="leave out the run through Ray Data")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few rows: does it run?")
    options = parser.parse_args(arguments)

    from benchmarks.ray_data import compare, estimate
    from benchmarks.results import result
    from benchmarks.study import Study

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.1f} min] {line}", file=sys.stderr, flush=True)

    given = {name: value for name, _, _ in OPTIONS if (value := getattr(options, name)) is not None}
    study = Study(replace(QUICK if options.quick else Amounts(), **given), say)
    study.measure(spare=lambda: 0.0 if options.without_ray else estimate(study))
    write(options.output, result(study, None))
    if not options.without_ray:
        write(options.output, result(study, compare(study, say)))
    print((options.output / "cpu.md").read_text())
    return 0


def write(folder: Path, measured: dict[str, Any]) -> None:
    """All files."""
    from benchmarks.page import PLOT, markdown, plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps(measured, indent=1) + "\n")
    (folder / "cpu.md").write_text(markdown(measured))
    (folder / f"{PLOT}.svg").write_text(plot(measured))


if __name__ == "__main__":
    sys.exit(main())
