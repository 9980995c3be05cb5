"""Measure what a row costs around the model: ``python -m benchmarks.scale --output benchmarks/results``.

A stand-in engine answers at once, over more and more rows; then one that takes its time shows whether actors are kept busy.
Writes ``scale.json`` and ``scale.md``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conditions import ROOT

ROWS = (10_000, 100_000, 1_000_000)
PACED_ROWS = 26_000
"""162 seconds at 8 rows in 50 ms."""
PACED_SECONDS = 220.0
START_SECONDS = 40.0
ROW_SECONDS = 1 / 1500
"""A row's cost where none has been measured yet, shards and all."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of scale.json and scale.md")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help="sizes; default: 10000 100000 1000000")
    parser.add_argument("--minutes", type=float, default=30, help="a size that would take longer than this is left out")
    options = parser.parse_args(arguments)

    from benchmarks.scale_page import markdown

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.1f} min] {line}", file=sys.stderr, flush=True)

    measured = study(options.rows, began + 60 * options.minutes, say)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scale.json").write_text(json.dumps(measured, indent=1) + "\n")
    (options.output / "scale.md").write_text(markdown(measured))
    print(markdown(measured))
    return 0


def study(rows: Sequence[int], ends: float, say: Callable[[str], object]) -> dict[str, Any]:
    """All sizes, smallest first, then the paced engine. ``ends`` is when all has to be done, on the monotonic clock."""
    from benchmarks.conditions import commit, processor
    from benchmarks.scale_page import FEW, REPEATS
    from pipeline.model import versions

    sizes: list[dict[str, Any]] = []
    left_out: list[int] = []
    # Of the machine as it was found: what is written meanwhile changes nothing.
    conditions = {
        "hardware": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
        "versions": versions(),
    }
    row_seconds = ROW_SECONDS
    for count in sorted(rows):
        now = time.monotonic()
        times = REPEATS if count <= FEW else 1
        if now + times * (START_SECONDS + 1.2 * row_seconds * count) + PACED_SECONDS > ends:
            say(f"{count:,} rows would take too long")
            left_out.append(count)
            continue
        runs = [_one(count, "StandIn", ends - PACED_SECONDS, say) for _ in range(times)]
        # What the page is about; a size of a few units has no such line.
        by = "seconds_per_unit" if any(run["row_seconds"] is None for run in runs) else "row_seconds"
        sizes.append(found := sorted(runs, key=lambda run: float(run[by]))[times // 2])
        row_seconds = 1.2 / found["rows_per_second"]
        say(f"{count:,} rows: {found['rows_per_second']:,.0f} rows/s, first after {found['first_row_seconds']:.1f} s")
    paced = None
    if time.monotonic() + PACED_SECONDS <= ends:
        paced = _one(PACED_ROWS, "Paced", ends, say)
        say("the paced engine ended too soon" if paced["busy"] is None else f"the paced engine was busy {paced['busy']:.1%}")
    return {"sizes": sizes, "left_out": left_out, "paced": paced, "conditions": conditions}


def _one(rows: int, actor: str, ends: float, say: Callable[[str], object]) -> dict[str, Any]:
    """Shards written and put through, by a process of its own, which is ended where it takes too long."""
    from benchmarks.scale_run import write_shards

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        shards, output, result = Path(folder) / "shards", Path(folder) / "out", Path(folder) / "result.json"
        say(f"writing {rows:,} rows")
        write_shards(shards, rows)
        say(f"running {rows:,} rows through {actor}")
        given = {"--shards": shards, "--output": output, "--result": result, "--actor": actor}
        command = [sys.executable, "-m", "benchmarks.scale_run", *(str(word) for pair in given.items() for word in pair)]
        # A Ray of its own, whatever the caller is connected to.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(max(1.0, ends - time.monotonic()))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if code:
            raise RuntimeError(f"the run of {rows:,} rows through {actor} ended with exit code {code}")
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


if __name__ == "__main__":
    sys.exit(main())
