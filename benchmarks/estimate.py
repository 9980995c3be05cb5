"""Hold ``jobs.estimate``'s model against what was measured: ``python -m benchmarks.estimate --results benchmarks/results``.

Reads ``cpu.json`` and, where there is one, ``gpu.json``; calibrates on one run of each, predicts all others, and writes
``estimate.json`` and ``estimate.md``. Nothing runs here, and no clock is read: the same measurements give the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.estimation.gpus import reported
from jobs.estimation.machine import Machine, fit_cpu, roofline, shares_of
from jobs.estimation.schedule import Call, Engine, Row
from jobs.report import STAGES, Stage
from trimming.costs import Costs

if TYPE_CHECKING:
    from benchmarks.model import ModelSize
    from benchmarks.workloads import Workload
    from trimming.tower import TowerTiles

Result = dict[str, Any]
BY_QUESTION = "by question"
"""The contender that keeps a set for each question; all others keep one an image."""
MERGED = "merged"
"""The one whose features are merged before any question is read."""
TOWERS = ("pooled", "tower", "whole")
"""Those with padding tiles pooled, and less of the tower."""
CALIBRATION = "captioning, continuous"
"""The run that the rates are fitted to."""
GPU_CALIBRATION = "captioning, engine"
GOAL = 0.25
"""The largest error of a stage."""
OURS = {
    "captioning": ("continuous", "trimmed", MERGED, "real", *TOWERS),
    "questions": ("continuous", "trimmed", MERGED, BY_QUESTION, "real", *TOWERS),
    "four_tiles": ("full", "half", MERGED),
}
"""Contenders of ``cpu.json`` that are the engine with continuous batching."""
COUNTED = ("decode_steps", "peak_sequences", "peak_cross_kv_megabytes")
"""Beside the seconds, what the engine counted."""
GPU_OURS = ("engine", "engine, trimmed", "engine, real tiles")


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run beside the calls that the cost model has for it."""

    name: str
    calls: list[Call]
    seconds: dict[Stage, float]
    steps: float
    """Decode steps, counted by the engine,"""
    peak: float
    """the most sequences that ran,"""
    held: float
    """and the most bytes that images' keys and values took."""


def cpu_runs(measured: Mapping[str, Any]) -> list[Run]:
    """The engine's runs in ``cpu.json``. Rows are made anew from the seed; of what was measured the mean kept fraction is used,
    which follows from the data. Raises ``ValueError`` where the benchmark has changed since."""
    from benchmarks import workloads

    conditions = measured["conditions"]
    size, costs = _model(conditions["model"], 4)
    make = {"captioning": workloads.captioning, "questions": workloads.questions, "four_tiles": workloads.four_tiles}
    runs = []
    for name, contenders in OURS.items():
        part = measured[name]
        load = make[name](part["images"], conditions["seed"], size)
        if load.tokens != part["output_tokens"]:
            raise ValueError(f"{name} has {part['output_tokens']} output tokens in cpu.json, and {load.tokens} as made now")
        room = part.get("kv_budget_bytes", float("inf"))
        for each in contenders:
            if each in part["contenders"]:
                found = part["contenders"][each]
                runs.append(_run(f"{name}, {each}", costs, load, found, room, conditions["max_sequences"]))
    return runs


def gpu_runs(measured: Mapping[str, Any]) -> list[Run]:
    """The engine's captioning runs in ``gpu.json``; those that were not reached are missing."""
    from benchmarks import workloads

    conditions, part = measured["conditions"], measured["sections"].get("captioning", {})
    contenders = part.get("contenders", {})
    reached = [each for each in GPU_OURS if "tower_seconds" in contenders.get(each, {})]
    if not reached:
        return []
    size, costs = _model(conditions["model"], 2)
    load = workloads.captioning(part["images"], conditions["seed"], size)
    return [_run(f"captioning, {each}", costs, load, contenders[each], float("inf"), part["images"]) for each in reached]


def result(cpu: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> Result:
    """The contents of ``estimate.json``. Errors are predicted / measured − 1."""
    runs = cpu_runs(cpu)
    (base,) = [run for run in runs if run.name == CALIBRATION]
    others = [run for run in runs if run.name != CALIBRATION]
    hardware = f"{cpu['conditions']['hardware']}, {cpu['conditions']['threads']} threads"
    machine = fit_cpu(hardware, base.calls, base.seconds)
    predicted = {run.name: _beside(run, machine) for run in others}
    found: Result = {
        "goal": GOAL,
        "hardware": hardware,
        "commit": cpu["conditions"]["commit"],
        "calibration": CALIBRATION,
        "rates": {
            "tower_operations_per_second": machine.operations["tower"],
            "language_operations_per_second": machine.operations["prefill"],
            "language_bytes_per_second": machine.bytes["prefill"],
        },
        "largest_error": _largest(predicted),
        "predicted": predicted,
        "calibrated_elsewhere": {run.name: _elsewhere(run, runs, hardware) for run in runs if run.name != CALIBRATION},
        "gpu": None if gpu is None or gpu["rehearsal"] else _gpu(gpu),
    }
    rounded: Result = _rounded(found)
    return rounded


def _gpu(measured: Mapping[str, Any]) -> Result:
    """Nothing is predicted without the run to calibrate with, without another, and on a card that the table lacks."""
    hardware = measured["conditions"]["hardware"]
    runs, gpu = gpu_runs(measured), reported(hardware)
    base = next((run for run in runs if run.name == GPU_CALIBRATION), None)
    others = [run for run in runs if run.name != GPU_CALIBRATION]
    if gpu is None or base is None or not others:
        return {"hardware": hardware, "predicted": {}}
    shares = shares_of(gpu.rate, gpu.bandwidth, base.calls, base.seconds)
    machine = roofline(hardware, gpu.rate, gpu.bandwidth, shares)
    predicted = {run.name: _beside(run, machine) for run in others}
    return {
        "hardware": hardware,
        "calibration": base.name,
        "roofline_shares": shares,
        "largest_error": _largest(predicted),
        "predicted": predicted,
    }


def _elsewhere(base: Run, runs: Sequence[Run], hardware: str) -> Result:
    """The largest errors had another run been the one to calibrate with."""
    machine = fit_cpu(hardware, base.calls, base.seconds)
    return _largest({run.name: _beside(run, machine) for run in runs if run.name != base.name})


def _model(conditions: Mapping[str, Any], itemsize: int) -> tuple[ModelSize, Costs]:
    from benchmarks.gpu.model import ELEVEN_B
    from benchmarks.model import BENCH, TINY, build_config, build_processor

    for size in (BENCH, TINY, ELEVEN_B):
        config = build_config(size, build_processor(size))
        text = config.text_config
        if (text.hidden_size, text.num_hidden_layers) == (conditions["hidden"], conditions["layers"]):
            return size, Costs(config, itemsize)
    raise ValueError(f"no model of the benchmarks has {conditions['layers']} layers of {conditions['hidden']}")


def _run(name: str, costs: Costs, load: Workload, found: Mapping[str, Any], room: float, most: int) -> Run:
    from benchmarks.study import LESS_TOWER, TOWER, WHOLE

    keep, contender = found["keep_fraction"], name.partition(", ")[2]
    ways: dict[str, TowerTiles] = {"real": "real", "engine, real tiles": "real", **dict.fromkeys(TOWERS, "pooled")}
    engine = Engine(
        costs=costs,
        kv_bytes=room,
        max_sequences=most,
        kept_sets="question" if contender == BY_QUESTION else "image",
        tower_tiles=ways.get(contender, "all"),
        tower_policy=LESS_TOWER if contender in (TOWER, WHOLE) else None,
        merged=contender in (MERGED, WHOLE),
    )
    rows = []
    for row in load.rows:
        tiles = load.tiles[row.image]
        # The image's token and the begin of text.
        prompt = len(row.prompt.split()) + 2
        # A mean over images: of one tile count the tower leaves a feature more or less.
        kept = engine.left(tiles) if contender == TOWER else round(keep * tiles * costs.tokens)
        rows.append(Row(row.image, tiles, prompt, row.length, kept, prompt + row.length))
    seconds: dict[Stage, float] = {stage: found[f"{stage}_seconds"] for stage in STAGES}
    return Run(
        name, list(engine.calls(rows)), seconds, found["decode_steps"], found["peak_sequences"], found["peak_cross_kv_bytes"]
    )


def _beside(run: Run, machine: Machine) -> Result:
    times = machine.by_stage(run.calls)
    stages: Result = {
        stage: {
            "measured": run.seconds[stage],
            "predicted": times[stage].seconds,
            "error": times[stage].seconds / run.seconds[stage] - 1,
        }
        for stage in STAGES
    }
    measured, predicted = (sum(stages[stage][which] for stage in STAGES) for which in ("measured", "predicted"))
    steps = [call.rows for call in run.calls if call.stage == "decode"]
    return {
        "stages": stages,
        "together": {"measured": measured, "predicted": predicted, "error": predicted / measured - 1},
        "decode_steps": {"measured": run.steps, "predicted": len(steps)},
        "peak_sequences": {"measured": run.peak, "predicted": max(steps)},
        "peak_cross_kv_megabytes": {"measured": run.held / 1e6, "predicted": max(call.held for call in run.calls) / 1e6},
    }


def _largest(predicted: Mapping[str, Any]) -> Result:
    """By stage and for all stages together, without its sign."""
    return {
        "stages": {stage: max(abs(one["stages"][stage]["error"]) for one in predicted.values()) for stage in STAGES},
        "together": max(abs(one["together"]["error"]) for one in predicted.values()),
    }


def _rounded(value: Any) -> Any:
    """Five significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def markdown(found: Result) -> str:
    """The page."""
    rates = found["rates"]
    lines = [
        f"Calibrated on one run ({found['calibration']}), on {found['hardware']}; commit {found['commit']} measured. Fitted to "
        f"it: {rates['tower_operations_per_second'] / 1e9:.0f} GFLOP/s in the tower, "
        f"{rates['language_operations_per_second'] / 1e9:.0f} GFLOP/s and {rates['language_bytes_per_second'] / 1e9:.1f} GB/s "
        "in the language model. Seconds, measured and predicted, and the error, predicted / measured − 1:",
        "",
        *_predicted(found),
        "",
        "The largest errors, with that run and with every other one to calibrate with:",
        "",
        "| calibrated on | tower | prefill | decode | all stages |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    each = {found["calibration"]: found["largest_error"], **found["calibrated_elsewhere"]}
    for name, largest in each.items():
        cells = [f"{largest['stages'][stage]:.0%}" for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(cells)} | {largest['together']:.0%} |")
    lines += ["", _verdict(found), "", *_gpu_lines(found["gpu"])]
    return "\n".join(lines) + "\n"


def _predicted(found: Result) -> list[str]:
    lines = [
        "| run | tower | prefill | decode | all stages | decode steps | sequences, most | cross KV held, most, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found["predicted"].items():
        cells = [_cell(one["stages"][stage]) for stage in STAGES] + [_cell(one["together"])]
        cells += [f"{one[key]['measured']:.0f}, {one[key]['predicted']:.0f}" for key in COUNTED]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    largest = found["largest_error"]
    cells = [f"**{error:.0%}**" for error in (*largest["stages"].values(), largest["together"])]
    return [*lines, f"| largest error (goal: under {GOAL:.0%}) | {' | '.join(cells)} |{'  |' * len(COUNTED)}"]


def _cell(one: Result) -> str:
    return f"{one['measured']:.2f}, {one['predicted']:.2f}: {one['error']:+.0%}".replace("-", "−")


def _verdict(found: Result) -> str:
    over = {stage: error for stage, error in found["largest_error"]["stages"].items() if error >= GOAL}
    if not over:
        return f"Every stage of every predicted run is within the goal of {GOAL:.0%}."
    return "Over the goal: " + ", ".join(f"{stage} ({error:.0%})" for stage, error in over.items()) + "."


def _gpu_lines(found: Result | None) -> list[str]:
    if found is None:
        return [
            "**On a GPU nothing has been measured yet**; `gpu.json`, once it exists, is held against the model here as well."
        ]
    if not found["predicted"]:
        return [
            f"On {found['hardware']} nothing is predicted: that needs the engine's captioning in `gpu.json` with all features "
            "and once more, on a card in `jobs/estimation/gpus.py`."
        ]
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in found["roofline_shares"].items())
    return [
        f"On {found['hardware']}, calibrated on one run ({found['calibration']}), which reached these shares of the data "
        f"sheet's peaks: {shares}.",
        "",
        *_predicted(found),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of cpu.json; estimate.json and .md are written there"
    )
    folder = parser.parse_args(arguments).results
    gpu = folder / "gpu.json"
    found = result(json.loads((folder / "cpu.json").read_text()), json.loads(gpu.read_text()) if gpu.exists() else None)
    (folder / "estimate.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "estimate.md").write_text(markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
