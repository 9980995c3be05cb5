"""Run the job on the demo's shards, full and trimmed, and show both side by side: what ``make demo`` does.

``python -m demo.run --shards demo-output/shards --output demo-output/answers`` starts ``python -m jobs.answer`` twice, each
time over both data sets, and reads the parquet it wrote. Started again, finished runs are only read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
K_RATIO = 0.25
POLICIES = {"full": ["--policy=none"], "trimmed": ["--policy=trimmed-llama", f"--k-ratio={K_RATIO}"]}
# Title by what the ids of the data set begin with.
SETS = {"easy-vqa/": "easy-VQA, test split", "scenes/": "held-out scenes"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder that demo.shards wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    options = parser.parse_args(arguments)
    if not any(options.shards.glob("*-test/*.parquet")):
        parser.error(f"--shards {options.shards} holds no test shards: run demo.shards first")
    if not (options.model / "config.json").exists():
        parser.error(f"--model {options.model} holds no model: train one with `make train-demo`")

    began = time.monotonic()
    for name, flags in POLICIES.items():
        print(f"\n== {name} → {options.output / name}", flush=True)
        if code := answer(options.shards, options.output / name, options.model, flags):
            print(f"demo.run: jobs.answer ended with {code}", file=sys.stderr)
            return code
    seconds = time.monotonic() - began
    runs = [Run(name, options.output / name) for name in POLICIES]
    print(f"\n{report(runs)}\n\nBoth runs: {seconds:.0f} s. One parquet row a question in")
    for run in runs:
        print(f"  {run.folder}")
    return 0


def answer(shards: Path, output: Path, model: Path, flags: Sequence[str]) -> int:
    """Start the job as a user would; its exit code."""
    paths = [f"--input={shards}/*-test/*.parquet", f"--output={output}", f"--model={model}"]
    return subprocess.run(
        [sys.executable, "-m", "jobs.answer", *paths, "--max-new-tokens=40", *flags],
        # Found from any working directory, also where the project is not installed.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        check=False,
    ).returncode


@dataclass(slots=True)
class Run:
    """One finished run, or the part of its rows in ``table``."""

    name: str
    folder: Path
    table: pa.Table = field(default=None)
    summary: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if self.table is None:
            self.table = pq.read_table(self.folder)
        self.summary = json.loads((self.folder / ".run/summary.json").read_text())

    def part(self, prefix: str) -> Run:
        """The rows whose id begins with ``prefix``."""
        return Run(self.name, self.folder, self.table.filter(pc.starts_with(self.table["id"], prefix)))

    def accuracy(self, kind: str | None = None) -> float:
        """Share of rows (of one kind) whose text is the answer; a failed row is a wrong one."""
        table = self.table if kind is None else self.table.filter(pc.equal(self.table["kind"], kind))
        right = pc.fill_null(pc.equal(table["text"], table["answer"]), False)
        return pc.mean(right).as_py() or 0.0

    def total(self, column: str) -> int:
        return pc.sum(self.table[column]).as_py() or 0


Lines = list[tuple[str, Callable[[Run], str]]]


def report(runs: Sequence[Run]) -> str:
    """One column a run: a block for each data set, and what only the whole run has."""
    lines = [columns("", [run.name for run in runs]), columns("policy", [policy_title(run.name) for run in runs])]
    for prefix, title in SETS.items():
        parts = [run.part(prefix) for run in runs]
        if len(parts[0].table):
            lines += ["", title]
            lines += [columns(f"  {name}", [value(part) for part in parts]) for name, value in set_lines(parts[0])]
    lines += ["", columns("images a second", [images_per_second(run) for run in runs])]
    return "\n".join(lines + [columns(name, [value(run) for run in runs]) for name, value in ENGINE_LINES])


def set_lines(run: Run) -> Lines:
    """What is said of a data set: a name, and how to read it from a run."""
    lines: Lines = [
        ("rows", lambda run: f"{len(run.table):,}"),
        ("errors", lambda run: f"{len(run.table) - run.table['error'].null_count:,}"),
        ("right answers", lambda run: f"{run.accuracy():.1%}"),
    ]
    for kind in sorted(pc.unique(run.table["kind"]).to_pylist()):
        lines.append((f"  {kind}{', exact' if kind == 'caption' else ''}", partial(accuracy_of_kind, kind)))
    return [
        *lines,
        ("features kept, mean", lambda run: f"{pc.mean(run.table['keep_fraction']).as_py() or 0:.1%}"),
        ("cross-attention KV", lambda run: f"{run.total('cross_kv_bytes') / 1e6:,.1f} MB"),
        ("  saved", lambda run: f"{1 - run.total('cross_kv_bytes') / max(1, run.total('cross_kv_bytes_full')):.1%}"),
    ]


def accuracy_of_kind(kind: str, run: Run) -> str:
    return f"{run.accuracy(kind):.1%}"


def images_per_second(run: Run) -> str:
    """Of the start that finished the run; none if an earlier start had done part of the work."""
    whole = run.summary["rows_this_start"] == run.summary["rows"]
    return f"{run.summary['images'] / run.summary['seconds_working']:.0f}" if whole else "-"


def counted(name: str, run: Run) -> str:
    return f"{run.summary[name]:,}"


def stage_seconds(stage: str, run: Run) -> str:
    return f"{run.summary['seconds_per_stage'].get(stage, 0):.1f}"


ENGINE_LINES: Lines = [
    ("  encoded", partial(counted, "images_encoded")),
    ("  shared with another row", partial(counted, "image_hits")),
    ("rows at once, most", partial(counted, "peak_sequences")),
    ("seconds in the tower", partial(stage_seconds, "tower")),
    ("  in prefill", partial(stage_seconds, "prefill")),
    ("  in decoding", partial(stage_seconds, "decode")),
]
"""What the engine did, over the whole run."""


def policy_title(name: str) -> str:
    return {"full": "none", "trimmed": f"K = {K_RATIO}"}[name]


def columns(name: str, values: Sequence[str]) -> str:
    return f"{name:26}" + "".join(f"{value:>12}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
