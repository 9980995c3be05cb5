"""The share of the roofline that each stage reached in the GPU benchmark (``python -m benchmarks.gpu``).

The benchmark's own shares are of the rates that it measured on its card. An estimate needs shares of the data sheet's peaks, as
it also predicts cards that were not measured, so they are computed here from seconds, operations and bytes.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.estimation.gpus import Gpu, reported
from jobs.report import STAGES, Stage

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu.json"
"""What the benchmark measured: a file of the repository, which an installed package lacks."""
DECODE_BATCH = 32
"""Sequences. Decode steps of fewer count only where no step of so many was measured: a job keeps its slots full."""
Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GpuBenchmark:
    """What an estimate takes from the benchmark."""

    hardware: str
    """The card, as CUDA names it."""
    gpu: Gpu | None
    """The card in the table of GPUs; None where the table lacks it."""
    model: str
    """Size of the model that was measured, such as 11b."""
    shares: Mapping[Stage, float]
    """Share of the data sheet's roofline of each stage that was measured; empty where nothing can be used."""
    unused: str | None
    """Why nothing can be used; None where something can."""


def read() -> GpuBenchmark | None:
    """The benchmark's results; None where the file is missing or is a rehearsal's, which measured nothing.

    Raises ``ValueError`` for a file of any other form.
    """
    try:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        return None if _field(found, "rehearsal", bool) else _benchmark(found)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{RESULTS} is no result of the GPU benchmark: {error}; run make gpu-kit, or remove it") from None


def _benchmark(found: Object) -> GpuBenchmark:
    conditions, sections = _field(found, "conditions", dict), _field(found, "sections", dict)
    hardware, model = _field(conditions, "hardware", str), _field(conditions, "size", str)
    gpu = reported(hardware)
    if gpu is None:
        unused = f"it was measured on {hardware!r}, which is not in the table of GPUs (jobs/estimation/gpus.py)"
        return GpuBenchmark(hardware, None, model, {}, unused)
    entries = {stage: _entries(stage, _field(sections, stage, dict, {})) for stage in STAGES}
    shares = {stage: _share(taken, gpu) for stage, taken in entries.items() if taken}
    return GpuBenchmark(hardware, gpu, model, shares, None if shares else "it has no seconds of any stage")


def _entries(stage: Stage, section: Object) -> Sequence[Object]:
    """The measurements that are like a job's calls: the tower with padding pooled, which older results lack, or all of it; full
    batches of prompts, many sequences a decode step."""
    if stage == "tower":
        found = map(_measured, _objects(section, "tiles"))
        return [modes.get("pooled", modes.get("all", {})) for modes in found if modes.keys() & {"pooled", "all"}]
    policies = [_measured(_field(policy, "batches", dict, {})) for policy in _objects(section, "policies")]
    by_batch = [{int(batch): entry for batch, entry in policy.items()} for policy in policies if policy]
    if stage == "prefill":
        return [policy[max(policy)] for policy in by_batch]
    least = min(DECODE_BATCH, max(map(max, by_batch), default=0))
    return [entry for policy in by_batch for batch, entry in policy.items() if batch >= least]


def _measured(entries: Object) -> dict[str, Object]:
    """Those with seconds: others ran out of memory or time."""
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and "seconds" in entry}


def _share(entries: Sequence[Object], gpu: Gpu) -> float:
    """Seconds that the data sheet's roofline allows over those that were measured, each summed over the entries."""
    allowed = sum(max(_amount(one, "operations") / gpu.rate, _amount(one, "bytes") / gpu.bandwidth) for one in entries)
    return allowed / sum(_amount(one, "seconds") for one in entries)


def _objects(found: Object, name: str) -> list[Object]:
    """The objects in ``found[name]``, none where that is missing."""
    whole = _field(found, name, dict, {})
    return [_field(whole, key, dict) for key in whole]


def _amount(entry: Object, name: str) -> float:
    value = _field(entry, name, int | float)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} must be positive")
    return float(value)


def _field(found: Any, name: str, kind: Any, default: Any = None) -> Any:
    """``found[name]``, or the default where it is missing. Raises ``ValueError`` for one of another type."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds {reprlib.repr(found)} instead of an object with {name}")
    value = found.get(name, default)
    if not isinstance(value, kind):
        raise ValueError(f"{name}={reprlib.repr(value)} is no {getattr(kind, '__name__', kind)}")
    return value
