"""An estimate as one dict: what was asked, what was assumed, and both predictions, unrounded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.estimation import gpu_benchmark, gpus, job, machine, models
from jobs.estimation.gpu_benchmark import GpuBenchmark
from jobs.estimation.gpus import Gpu
from jobs.estimation.job import Job
from jobs.estimation.machine import Machine
from jobs.estimation.measured import Measured, read
from jobs.estimation.predict import Prediction, predict
from jobs.report import STAGES, Stage
from pipeline.model import tower_policy_of
from trimming.costs import Costs
from trimming.engine.scheduler import PREFILL_TOKENS, PREFILL_VISUAL_TOKENS, TOWER_IMAGES
from trimming.tower import TowerPolicy

Report = dict[str, Any]
ERRORS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "estimate.json"
"""The model's errors on measured runs: a file of the repository, which an installed package lacks."""
DEFAULT_K = 0.25
CPU_ACTORS = "actors"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the job is to run."""

    machine: Machine
    gpu: Gpu | None
    """None: the CPU of the measured run."""
    calibration: str
    shares: Mapping[Stage, float] | None
    """Shares of the roofline by stage; None on a CPU."""
    benchmark: GpuBenchmark | None = None
    """What the GPU benchmark measured of them, or why it is not used; None without it, and with a run of the user's own."""
    assumed: Sequence[Stage] = ()
    """Stages whose shares are assumptions."""


def build(given: Mapping[str, Any]) -> Report:
    """The estimate for the command line's options. Raises ``ValueError`` and ``OSError``, in one line, for what is refused."""
    _check(given)
    run = read(given["from"], given["storage_options"]) if given["from"] else None
    place = _place(given, run)
    model = given["model"] or (run.model if run else None)
    if model is None:
        raise ValueError("model=None: state --model 11b, 90b, or a folder or hub name; or --from a run, whose model is taken")
    config = models.config_of(model, given["revision"])
    costs = Costs(config, run.itemsize if run and place.gpu is None else 2)
    asked, said = _job(given, run, config.vision_config.max_num_tiles)
    length, most = asked.prompt + asked.longest, config.text_config.max_position_embeddings
    if length > most:
        raise ValueError(f"prompt_tokens and max_new_tokens together are {length:g}, over the model's {most}")
    if given["merged"] and given["keep"] is None and not _was_merged(run):
        raise ValueError("merged=True needs --keep, the share of the features that is left once alike ones are merged")
    keep, k_ratio, why = _keep(given, run, asked.tower_policy, models.size_of(config))
    room = _room(given, run, place, costs, asked)
    dear: dict[str, Any] = {
        "kv_bytes": room,
        "gpus": given["gpus"],
        "gpus_per_actor": given["gpus_per_actor"],
        "price": given["price"],
    }
    full = predict(replace(asked, tower_policy=None), costs, place.machine, keep=1.0, **dear)
    trimmed = predict(asked, costs, place.machine, keep=keep, **dear)
    gpu = place.gpu
    return {
        "model": model,
        "hardware": place.machine.title,
        "unit": CPU_ACTORS if gpu is None else "GPUs",
        "gpu": None if gpu is None else asdict(gpu),
        "gpus": given["gpus"],
        "gpus_per_actor": given["gpus_per_actor"],
        "price": given["price"],
        "weights_bytes": sum(costs.weights.values()),
        "kv_bytes": room,
        "job": asdict(asked) | {"mean_tiles": asked.mean_tiles, "tower_policy": _tower(asked, costs)},
        "job_from": said,
        "k_ratio": k_ratio,
        "keep": keep,
        "keep_from": why,
        "calibration": place.calibration,
        "roofline_shares": None if place.shares is None else dict(place.shares),
        "assumed_shares": list(place.assumed),
        "gpu_benchmark": None if place.benchmark is None else asdict(place.benchmark),
        "rates": {
            stage: {
                "operations_per_second": _finite(place.machine.operations[stage]),
                "bytes_per_second": _finite(place.machine.bytes[stage]),
            }
            for stage in STAGES
        },
        "rates_add_up": place.machine.adds,
        "run": None
        if run is None
        else {
            "name": run.name,
            "device": run.device,
            "busy": run.busy,
            "mean_batch": run.mean_batch,
            "like": "trimmed" if run.trims else "full",
        },
        "full": _prediction(full),
        "trimmed": _prediction(trimmed),
        "errors": errors(),
    }


def _tower(asked: Job, costs: Costs) -> Report | None:
    """Which rows go on through the tower, and the share of the features that it leaves."""
    policy = asked.tower_policy
    if policy is None:
        return None
    left = sum(share * costs.tower_rows(tiles, policy)[-1] for tiles, share in asked.tiles.items())
    return {"name": type(policy).__name__, "keep": policy.keep, "left": left / (asked.mean_tiles * costs.tokens)}


def errors() -> dict[str, Any] | None:
    """The largest errors that ``benchmarks.estimate`` found, by stage and of all together; None where its file is missing."""
    try:
        found = json.loads(ERRORS.read_text())
    except FileNotFoundError:
        return None
    return {
        "largest": found["largest_error"],
        "runs": len(found["predicted"]),
        "hardware": found["hardware"],
        "gpu": found["gpu"],
    }


def _check(given: Mapping[str, Any]) -> None:
    images = given["images"]
    if images < 1 or images != int(images):
        raise ValueError(f"images={images:g} must be a whole number of at least 1, such as 10e6")
    if given["gpus"] < 1 or given["gpus_per_actor"] < 1:
        raise ValueError(f"gpus={given['gpus']} and gpus_per_actor={given['gpus_per_actor']} must be at least 1")
    if given["gpus"] % given["gpus_per_actor"]:
        raise ValueError(f"gpus={given['gpus']} is no multiple of gpus_per_actor={given['gpus_per_actor']}; some would be idle")
    for name in ("price", "image_cache_gib"):
        if given[name] is not None and not 0 <= given[name] < float("inf"):
            raise ValueError(f"{name}={given[name]} must not be negative")
    for name in ("gpu_memory", "gpu_bandwidth", "gpu_rate", "kv_gib"):
        if given[name] is not None and not 0 < given[name] < float("inf"):
            raise ValueError(f"{name}={given[name]} must be positive")
    if given["max_tiles"] is not None and given["max_tiles"] < 1:
        raise ValueError(f"max_tiles={given['max_tiles']} must be at least 1")
    if given["k_ratio"] is not None and given["keep"] is not None:
        raise ValueError(f"k_ratio={given['k_ratio']} and keep={given['keep']}: state one; a K's kept fraction is looked up")
    for name in ("k_ratio", "keep"):
        if given[name] is not None and not 0 < given[name] <= 1:
            raise ValueError(f"{name}={given[name]} must lie in (0, 1]")


def _place(given: Mapping[str, Any], run: Measured | None) -> Place:
    own = {name: given[f"gpu_{name}"] for name in ("memory", "bandwidth", "rate")}
    stated = [name for name, value in own.items() if value is not None]
    if stated and given["gpu"]:
        raise ValueError(f"gpu={given['gpu']!r} is in the table; drop --gpu-{stated[0]}, or --gpu")
    if stated and len(stated) < 3:
        missing = next(name for name in own if name not in stated)
        raise ValueError(f"gpu_{missing}=None: a GPU that the table lacks needs --gpu-memory, --gpu-bandwidth and --gpu-rate")
    gpu = gpus.find(given["gpu"]) if given["gpu"] else None
    if stated:
        gpu = Gpu("the stated GPU", own["memory"] * 1e9, own["bandwidth"] * 1e9, own["rate"] * 1e12, "stated")
    if run is not None and run.gpu is None:
        if gpu is not None:
            raise ValueError(f"from={run.name!r} ran on {run.device}, which says nothing of a GPU; drop --gpu, or --from")
        fitted = run.machine(Costs(models.config_of(run.model), run.itemsize))
        return Place(fitted, None, f"this CPU's rates, fitted to {run.name}", None)
    gpu = gpu or (run.gpu if run else None)
    if gpu is None:
        raise ValueError(f"gpu=None: name one ({', '.join(gpus.GPUS)}), or give --gpu-memory, --gpu-bandwidth and --gpu-rate")
    if run is None:
        benchmark = gpu_benchmark.read()
        measured = benchmark.shares if benchmark else {}
        shares = {**machine.ASSUMED, **measured}
        said = "not calibrated: assumed shares of the data sheet's peaks"
        if benchmark and measured:
            said = f"shares of the data sheet's peaks measured on {benchmark.hardware}"
        assumed = [stage for stage in STAGES if stage not in measured]
        return Place(machine.roofline(gpu.title, gpu.rate, gpu.bandwidth, shares), gpu, said, shares, benchmark, assumed)
    shares = run.shares(Costs(models.config_of(run.model), run.itemsize))
    said = f"shares of the peaks that {run.name} reached on {run.device}"
    return Place(machine.roofline(gpu.title, gpu.rate, gpu.bandwidth, shares), gpu, said, shares)


def _job(given: Mapping[str, Any], run: Measured | None, most: int) -> tuple[Job, dict[str, str]]:
    """The job, and where each of its figures is from."""
    said: dict[str, str] = {}

    def taken(name: str, of_run: Any, default: Any) -> Any:
        if given[name] is not None:
            said[name] = "stated"
            return given[name]
        said[name] = "default" if run is None else "the run's"
        return default if run is None else of_run

    tiles = taken("tiles", run and run.tiles, job.DEFAULT_TILES)
    if isinstance(tiles, str):
        tiles = job.read_tiles(tiles, most)
    output = taken("output_tokens", run and run.output, job.DEFAULT_OUTPUT)
    stated_output = given["output_tokens"] is not None
    longest = taken("max_new_tokens", None if stated_output else run and run.longest, None)
    if longest is None:
        said["max_new_tokens"] = "twice the mean"
        longest = max(2, round(2 * output))
    made = Job(
        images=int(given["images"]),
        questions=taken("questions", run and run.questions, 1),
        tiles=job.cut(tiles, given["max_tiles"]),
        prompt=taken("prompt_tokens", run and run.prompt, job.DEFAULT_PROMPT),
        output=output,
        longest=longest,
        batch_size=taken("batch_size", run and run.batch_size, 256),
        tower_tiles=taken("tower_tiles", run and run.tower_tiles, "pooled"),
        tower_policy=_tower_policy(given, run, said),
        image_cache=given["image_cache_gib"] > 0,
        kept_sets=taken("kept_sets", run and run.kept_sets, "image"),
        merged=given["merged"] or (given["k_ratio"] is None and _was_merged(run)),
    )
    return made, said


def _tower_policy(given: Mapping[str, Any], run: Measured | None, said: dict[str, str]) -> TowerPolicy | None:
    """The stated policy or the run's, at the stated share, that of the run's own policy, or the default; None where all rows go
    through the tower."""
    of_run = None if run is None else run.tower_policy
    name, keep = given["tower_policy"] or of_run, given["tower_keep"]
    if name is not None:
        said["tower_policy"] = "stated" if given["tower_policy"] else "the run's"
        said["tower_keep"] = "stated"
        if keep is None:
            said["tower_keep"] = "the run's" if name == of_run else "default"
            keep = run.tower_keep if run is not None and name == of_run else None
    policy = tower_policy_of(name, keep)
    return None if policy is None or policy.keep == 1 else policy


def _was_merged(run: Measured | None) -> bool:
    """Whether a run's kept share is what clusters left."""
    return run is not None and run.merged and run.keep < 1


def _keep(
    given: Mapping[str, Any], run: Measured | None, tower: TowerPolicy | None, size: str | None
) -> tuple[float, float | None, str]:
    """The kept share of what the tower leaves, its K where there is one, and how it is known."""
    if given["keep"] is not None:
        return given["keep"], None, "stated"
    if run is not None and run.trims and run.k_ratio is None and given["k_ratio"] is None:
        return run.keep_of_left, None, "measured by the run" + _carried(run.tower, tower)
    if run is not None and run.k_ratio is not None:
        k_ratio = given["k_ratio"] or run.k_ratio
        if k_ratio == run.k_ratio:
            return run.keep_of_left, k_ratio, "measured by the run at this K" + _carried(run.tower, tower)
        kept = models.keep_fraction(k_ratio, {run.k_ratio: run.keep_of_left})
        return kept, k_ratio, "from the run's kept fraction at its own K, by the curve" + _carried(run.tower, tower)
    k_ratio = given["k_ratio"] or DEFAULT_K
    published = models.PUBLISHED.get(size or "", {})
    kept = models.keep_fraction(k_ratio, published)
    why = (
        f"published for the {size}"
        if k_ratio in published or k_ratio == 1
        else f"on a curve through the {size}'s published points"
    )
    return kept, k_ratio, f"{why}, arXiv 2504.00557; your data decide" + _carried(None, tower)


def _carried(known: TowerPolicy | None, tower: TowerPolicy | None) -> str:
    """What is to be said of a kept share that is known of what one tower leaves, and taken for another's."""
    return "" if known == tower else "; that this much stays of what another tower leaves is an assumption"


def _room(given: Mapping[str, Any], run: Measured | None, place: Place, costs: Costs, asked: Job) -> float:
    stated = None if given["kv_gib"] is None else given["kv_gib"] * 2**30
    if place.gpu is None:
        assert run is not None
        return stated or run.kv_bytes
    count = given["gpus_per_actor"]
    cache = given["image_cache_gib"] * 2**30
    activations = costs.activations(
        images=TOWER_IMAGES, visual=PREFILL_VISUAL_TOKENS, prompt=PREFILL_TOKENS, sequences=asked.batch_size
    )
    room = job.kv_room(place.gpu.memory, count, sum(costs.weights.values()), cache, activations)
    if stated is not None and stated > room:
        raise ValueError(
            f"kv_gib={given['kv_gib']:g} is over the {room / 2**30:.1f} GiB that {count} × {place.gpu.title} leave"
        )
    return stated or room


def _prediction(made: Prediction) -> Report:
    return asdict(made) | {
        "stages": {
            stage: asdict(time) | {"bound": time.bound, "bound_share": time.bound_share} for stage, time in made.stages.items()
        },
        "seconds": made.seconds,
    }


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
