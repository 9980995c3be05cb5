"""Predict what a run will take before anything is rented: seconds by stage, GPU hours, days and dollars, full and trimmed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from jobs import options
from pipeline.config import TowerPolicyName, TowerTiles


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="python -m jobs.estimate", description=__doc__, exit_on_error=False, allow_abbrev=False)
    add = made.add_argument
    add("--images", type=float, required=True, help="number of images, e.g. 10e6")
    add("--model", type=str | None, help="11b, 90b, or a folder or hub name with a config.json; default: the run's of --from")
    add("--revision", type=str | None, help="branch, tag or commit of the model on the Hub")
    add(
        "--gpu",
        type=str | None,
        help="name in jobs/estimation/gpus.py, such as h100, h200, a100-80, l40s; a wrong one lists all",
    )
    add("--gpu-memory", type=float | None, help="of a GPU that the table lacks: GB")
    add("--gpu-bandwidth", type=float | None, help="of a GPU that the table lacks: GB a second")
    add("--gpu-rate", type=float | None, help="of a GPU that the table lacks: dense bf16 TFLOP a second")
    add("--gpus", type=int, default=1, help="GPUs in all; actors in all where --from ran on a CPU")
    add("--gpus-per-actor", type=int, default=1, help="GPUs for each copy of the model, one of which works at a time")
    add("--price", type=float | None, help="dollars an hour for each GPU; default: none, and then no dollars")
    add("--k-ratio", type=float | None, help="Trimmed-Llama's K; default: the run's of --from, else 0.25")
    add("--keep", type=float | None, help="the kept fraction of what the tower leaves, instead of K")
    add("--merged", action="store_true", help="--keep is what clusters leave, merged before any question is read")
    add(
        "--kept-sets",
        type=Literal["image", "question"] | None,
        help="who decides what is kept: all questions about an image together, or each for itself; default: image",
    )
    add("--questions", type=float | None, help="rows about each image; default: 1")
    add(
        "--tiles",
        type=str | None,
        help="real tiles: a mean (2.3) or shares of images (1:0.2,4:0.8); default: 1:0.15,2:0.7,4:0.15",
    )
    add("--max-tiles", type=int | None, help="most tiles an image is cut into")
    add(
        "--tower-tiles",
        type=TowerTiles | None,
        help="padding tiles in the tower: pooled into a few rows each, all of them, or none (real); default: pooled",
    )
    add("--tower-policy", type=TowerPolicyName | None, help="which rows go on through the tower, where trimmed; default: all")
    add("--tower-keep", type=float | None, help="with a tower policy: share of rows × layers that is left; default: 0.5")
    add("--prompt-tokens", type=float | None, help="mean tokens of a prompt; default: 32")
    add("--output-tokens", type=float | None, help="mean tokens of an answer; default: 64")
    add("--max-new-tokens", type=int | None, help="longest answer, which memory is reserved for; default: twice the mean")
    add("--batch-size", type=int | None, help="rows that decode at once, at most; default: 256")
    add("--kv-gib", type=float | None, help="memory for keys and values, in GiB; default: what the weights leave")
    add(
        "--image-cache-gib",
        type=float,
        default=1.0,
        help="memory for encoded images, in GiB; 0 encodes an image anew for each kept set",
    )
    add(
        "--from",
        type=str | None,
        metavar="RUN",
        help="output folder of a run, local or s3://, to calibrate with; its figures stand in for the defaults above",
    )
    add("--storage-options", type=dict, default={}, help="options for s3fs (JSON or YAML); never recorded")
    add("--json", type=str | None, metavar="FILE", help="also write everything there, unrounded")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, estimates and prints; returns the exit code: 0 done, 2 refused."""
    made = parser()
    options.escape_unencodable()
    try:
        given = made.parse_args(arguments).as_dict()
        from jobs.estimation import page, report

        found = report.build(given)
        if given["json"]:
            Path(given["json"]).expanduser().write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        return options.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever a store or the Hub answers: nothing has been written
        return options.refuse(made, error)
    print(page.text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
