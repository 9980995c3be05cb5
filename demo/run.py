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
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from demo import MODEL

ROOT = Path(__file__).resolve().parent.parent
K_RATIO = 0.25
POLICIES = {"full": ["--policy=none"], "trimmed": ["--policy=trimmed-llama", f"--k-ratio={K_RATIO}"]}
# Title by what the ids of the data set begin with.
SETS = {"easy-vqa/": "easy-VQA, test split", "scenes/": "held-out scenes"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder that demo.shards wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--model", type=Path, default=MODEL)
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
    runs = [Run(options.output / name) for name in POLICIES]
    print(f"\n{report(*runs)}\n\nBoth runs: {seconds:.0f} s. One parquet row a question in")
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

    folder: Path
    table: pa.Table = field(default=None)
    summary: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if self.table is None:
            self.table = pq.read_table(self.folder)
        self.summary = json.loads((self.folder / ".run/summary.json").read_text())

    def part(self, prefix: str) -> Run:
        """The rows whose id begins with ``prefix``."""
        return Run(self.folder, self.table.filter(pc.starts_with(self.table["id"], prefix)))

    def accuracy(self, kind: str | None = None) -> float:
        """Share of rows (of one kind) whose text is the answer; a failed row is a wrong one."""
        table = self.table if kind is None else self.table.filter(pc.equal(self.table["kind"], kind))
        right = pc.fill_null(pc.equal(table["text"], table["answer"]), False)
        return pc.mean(right).as_py() or 0.0

    def stages(self, *names: str) -> float:
        """Seconds of the device in these stages; one that nothing went through is not in the summary."""
        return sum(self.summary["seconds_per_stage"].get(name, 0.0) for name in names)

    @property
    def images_per_second(self) -> float:
        """Per actor, once its model is loaded."""
        return self.summary["images"] / self.summary["actor_seconds"]


def report(full: Run, trimmed: Run) -> str:
    """Both runs side by side: how each data set was answered, then what the machine held and how long it took for both, with
    trimmed as a multiple of full, and in what trimmed is the better one."""
    lines = [columns("", "full", "trimmed", "trimmed / full"), columns("policy", "none", f"K = {K_RATIO}")]
    for prefix, title in SETS.items():
        parts = full.part(prefix), trimmed.part(prefix)
        if len(parts[0].table):
            lines += ["", title, *set_lines(*parts)]
    lines += ["", "both sets, in the machine"]
    for name, (value, shown) in MACHINE_LINES.items():
        before, after = value(full), value(trimmed)
        lines.append(columns(f"  {name}", shown.format(before), shown.format(after), f"{ratio(after, before):.2f} ×"))
    return "\n".join([*lines, "", *verdict(full, trimmed)])


def set_lines(full: Run, trimmed: Run) -> list[str]:
    """How the rows of a data set were answered."""
    runs = full, trimmed
    lines = [
        columns("  rows", *(f"{len(run.table):,}" for run in runs)),
        columns("  errors", *(f"{len(run.table) - run.table['error'].null_count:,}" for run in runs)),
    ]
    for kind in [None, *sorted(pc.unique(full.table["kind"]).to_pylist())]:
        name = "  right answers" if kind is None else f"    {kind}{', exact' if kind == 'caption' else ''}"
        before, after = (run.accuracy(kind) for run in runs)
        lines.append(columns(name, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"))
    kept = (f"{pc.mean(run.table['keep_fraction']).as_py() or 0:.1%}" for run in runs)
    return [*lines, columns("  features kept, mean", *kept)]


MACHINE_LINES: dict[str, tuple[Callable[[Run], float], str]] = {
    "peak cross KV held": (lambda run: run.summary["peak_cross_kv_bytes"] / 1e6, "{:,.1f} MB"),
    "byte-seconds held": (lambda run: run.summary["cross_kv_byte_seconds"] / 1e6, "{:,.1f} MB·s"),
    "bytes read in decoding": (lambda run: run.summary["cross_kv_bytes_read"] / 1e6, "{:,.1f} MB"),
    "seconds in the tower": (lambda run: run.stages("tower"), "{:.1f}"),
    "  in prefill": (lambda run: run.stages("prefill"), "{:.1f}"),
    "  in decoding": (lambda run: run.stages("decode"), "{:.1f}"),
    "  in both of these": (lambda run: run.stages("prefill", "decode"), "{:.1f}"),
    "images a second": (lambda run: run.images_per_second, "{:.1f}"),
    "rows at once, most": (lambda run: run.summary["peak_sequences"], "{:,}"),
}
"""What is said of both sets: the value, and how it is written. Held bytes are counted once however many rows share them."""


def verdict(full: Run, trimmed: Run) -> list[str]:
    """In which of held bytes, seconds and images a second trimmed is the better one, and why it is not in the others."""
    peak, held = (ratio(trimmed.summary[key], full.summary[key]) for key in ("peak_cross_kv_bytes", "cross_kv_byte_seconds"))
    prefill, decoding = (ratio(trimmed.stages(name), full.stages(name)) for name in ("prefill", "decode"))
    spent = full.stages("prefill", "decode")
    both, images = ratio(trimmed.stages("prefill", "decode"), spent), ratio(trimmed.images_per_second, full.images_per_second)
    rows, more = full.summary["peak_sequences"], trimmed.summary["peak_sequences"]
    sharing = f"it had {more:,} rows at once, not {rows:,}" if more > rows else "its rows share less of what they keep"
    part = f"prefill and decoding are {spent:.1f} of {full.summary['actor_seconds']:.1f} s, and trimming changes nothing else"
    claims = [
        (f"held bytes (peak {peak:.2f} ×, byte-seconds {held:.2f} ×)", max(peak, held) < 1, sharing),
        (
            f"seconds (prefill and decoding, {both:.2f} ×)",
            both < 1,
            f"prefill takes {prefill:.2f} ×, decoding {decoding:.2f} ×",
        ),
        (f"images a second ({images:.2f} ×)", images > 1, part),
    ]
    gains = ", ".join(claim for claim, better, _ in claims if better) or "nothing"
    return [f"Trimmed is better in {gains}.", *(f"It is not in {claim}: {why}." for claim, better, why in claims if not better)]


def ratio(value: float, base: float) -> float:
    """1 where there is nothing to be a multiple of."""
    return value / base if base else 1.0


def columns(name: str, *values: str) -> str:
    return (f"{name:26}" + "".join(f"{value:>{width}}" for value, width in zip(values, (12, 12, 16), strict=False))).rstrip()


if __name__ == "__main__":
    sys.exit(main())
