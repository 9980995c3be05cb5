"""Measure every policy at equal cost: ``python -m benchmarks.pareto --output benchmarks/results``.

All contenders of ``benchmarks/pareto_contenders.py``, on the demo models over their test sets: policies at equal held bytes,
with fewer tiles and lower resolution beside them; ways through the tower end to end, by images/s. Writes ``pareto.json``,
``pareto.md`` and its plots. What is finished is kept in a journal under ``--work``: the same command continues, and a new
policy is measured alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo import MODEL, PHOTO_MODEL, scenes, shards
from demo.scenes import PHOTO
from demo.table import ROOT, write

if TYPE_CHECKING:
    from benchmarks.pareto_contenders import Way
    from benchmarks.pareto_run import Entry, Study

SAY_EVERY = 20.0
"""Seconds between two lines of progress."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="for easy-VQA and scenes (default: %(default)s)")
    parser.add_argument("--photo-model", type=Path, default=PHOTO_MODEL, help="for scenes over photographs")
    parser.add_argument("--output", type=Path, required=True, help="folder of pareto.json, pareto.md and the plots")
    parser.add_argument("--work", type=Path, default=ROOT / "build/pareto", help="folder of the journal (default: %(default)s)")
    parser.add_argument(
        "--easy-vqa", type=int, metavar="N", default=200, help="images, ten questions each (default: %(default)s)"
    )
    parser.add_argument(
        "--scenes", type=int, metavar="N", default=300, help="scenes, six questions each (default: %(default)s)"
    )
    parser.add_argument(
        "--photo-scenes", type=int, metavar="N", default=200, help="over photographs, six questions each (default: %(default)s)"
    )
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        default=10,
        help="parts of each set, in which policies take turns; small enough that all rows of one run at once",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads; default: torch's own choice")
    parser.add_argument("--page", action="store_true", help="write the page anew from pareto.json, and measure nothing")
    options = parser.parse_args(arguments)

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "pareto.json"
    if options.page:
        report = json.loads(file.read_text())
    else:
        report = measured(options)
        write(file, text(report))

    from benchmarks.pareto_page import markdown
    from benchmarks.pareto_plots import plots

    for name, svg in plots(report).items():
        write(options.output / f"{name}.svg", svg)
    write(options.output / "pareto.md", markdown(report))
    print(markdown(report))
    return 0


def text(report: dict[str, Any]) -> str:
    """JSON with a line for each innermost object."""
    return re.sub(r"\{[^{}\[\]]*\}", lambda found: " ".join(found[0].split()), json.dumps(report, indent=1)) + "\n"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The contents of ``pareto.json``, from the journal and from what it lacks."""
    import torch

    from benchmarks.pareto_bench import Bench, DataSet
    from benchmarks.pareto_results import result
    from benchmarks.pareto_run import PRIMITIVE_CACHE, Journal, Study

    # oneDNN reads it at its first product.
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(PRIMITIVE_CACHE)
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.1f} min] {line}", file=sys.stderr, flush=True)

    # All questions about an image: what they share is what is measured.
    easy_vqa = shards.easy_vqa_rows("test", shards.EASY_VQA_QUESTIONS["test"])
    sets = {
        "easy-vqa-test": (options.model, islice(easy_vqa, options.easy_vqa)),
        "scenes-test": (options.model, shards.scene_rows("test", options.scenes, scenes.KINDS)),
        "photo-scenes-test": (options.photo_model, shards.scene_rows("test", options.photo_scenes, scenes.KINDS, PHOTO)),
    }
    data_sets = [(model, DataSet(name, list(images), options.blocks)) for name, (model, images) in sets.items()]
    bench, journal = cache(Bench), Journal(options.work / "cells.jsonl")
    studies = [Study(bench(model), journal, data, say) for model, data in data_sets if data.images]
    plans = [(study, study.plan(), study.ways()) for study in studies]
    measure(plans, say)
    return result(plans, say)


def measure(plans: Sequence[tuple[Study, Sequence[Entry], Sequence[Way]]], say: Callable[[str], None]) -> None:
    """Every cell that the journal lacks, block by block, with how many are left and for how long."""
    todo = [
        work
        for block in range(max(study.data.blocks for study, _, _ in plans))
        for study, entries, ways in plans
        for work in study.todo(entries, ways, block)
    ]
    say(f"{len(todo):,} cells to measure")
    spent: dict[str, list[float]] = {}
    told = time.monotonic()
    for done, work in enumerate(todo, 1):
        began = time.monotonic()
        work.do()
        spent.setdefault(work.kind, []).append(time.monotonic() - began)
        if time.monotonic() - told > SAY_EVERY or done == len(todo):
            told = time.monotonic()
            means = {kind: sum(each) / len(each) for kind, each in spent.items()}
            known = sum(means.values()) / len(means)
            left = sum(means.get(other.kind, known) for other in todo[done:])
            end = time.strftime("%H:%M", time.gmtime(time.time() + left))
            say(f"{done:,} of {len(todo):,} cells, {left / 60:.1f} minutes left, until {end} UTC")


if __name__ == "__main__":
    sys.exit(main())
