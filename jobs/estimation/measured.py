"""A finished run as an estimate needs it: what its rows were, how long its stages took, on what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobs.comparison.runs import Run, read_run
from jobs.estimation.gpus import Gpu, reported
from jobs.estimation.job import CPU_KV
from jobs.estimation.machine import Machine, fit_cpu, roofline, shares_of
from jobs.estimation.models import config_of
from jobs.estimation.schedule import Call, Engine, Row
from jobs.report import STAGES, Stage
from pipeline.model import tower_policy_of
from pipeline.storage import Storage
from trimming.costs import Costs, Look
from trimming.engine.request import KeptSets
from trimming.tower import TowerPolicy, TowerTiles

SAMPLE_ROWS = 4096
"""Rows of the run that its schedule is worked out for; of more than these the first ones stand for all."""
READ_ROWS = 200_000
"""Rows that means are taken over, about; likewise."""
_COLUMNS = ("image_digest", "images", "tiles", "prompt_tokens", "output_tokens", "kept_visual_tokens", "visual_tokens")
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. Means are over its rows with one image, which are all that the model knows of."""

    name: str
    model: str
    """Folder or name of its checkpoint."""
    device: str
    gpu: Gpu | None
    """None on a CPU."""
    itemsize: int
    """Bytes of a number."""
    rows: tuple[Row, ...]
    """The first ones, in order."""
    seconds: Mapping[Stage, float]
    """Of the stages, summed over actors, for as many rows as ``rows`` holds."""
    decode_steps: float
    decode_tokens: float
    """Likewise."""
    busy: float | None
    """Share of the actors' time that is in these stages; None where the run did not time its actors."""
    tiles: Mapping[int, float]
    questions: float
    prompt: float
    output: float
    keep: float
    """Share of all visual tokens."""
    k_ratio: float | None
    """None where another policy ran."""
    longest: int
    batch_size: int
    kv_gib: float | None
    tower_tiles: TowerTiles
    tower_policy: str | None
    tower_keep: float | None
    kept_sets: KeptSets
    merged: bool
    """Whether what was kept is what was left once alike features were merged."""
    encode_once: bool
    peak_sequences: int

    @property
    def mean_batch(self) -> float:
        """Sequences of a decode step."""
        return self.decode_tokens / self.decode_steps

    @property
    def tower(self) -> TowerPolicy | None:
        """None where all rows went through the tower."""
        return None if self.tower_keep == 1 else tower_policy_of(self.tower_policy, self.tower_keep)

    @property
    def trims(self) -> bool:
        """Whether anything was left out, in the tower or behind it."""
        return self.tower is not None or self.keep_of_left < 1

    @cached_property
    def keep_of_left(self) -> float:
        """Share that was kept of what the tower left."""
        if self.tower is None:
            return self.keep
        # Of the rows at hand, in whole features: a run that kept everything has kept exactly that.
        costs = Costs(config_of(self.model))
        return sum(row.kept for row in self.rows) / sum(costs.tower_rows(row.tiles, self.tower)[-1] for row in self.rows)

    def calls(self, costs: Costs) -> list[Call]:
        """What the run did, through the cost model: towers and prefills as the scheduler would have called them for its rows,
        decode steps as many as it counted, each like its mean one."""
        engine = Engine(
            costs=costs,
            # It had room for the most that it ran.
            kv_bytes=float("inf"),
            max_sequences=max(1, self.peak_sequences),
            kept_sets=self.kept_sets,
            tower_tiles=self.tower_tiles,
            tower_policy=self.tower,
            encode_once=self.encode_once,
            merged=self.merged,
        )
        calls = [call for call in engine.calls(self.rows) if call.stage != "decode"]
        step = self._step(costs)
        return calls + [step] * round(self.decode_steps)

    def _step(self, costs: Costs) -> Call:
        """The mean step: a row counts by the steps it takes part in."""
        steps = sum(row.output - 1 for row in self.rows)
        lengths = sum((row.output - 1) * (row.prompt + row.output / 2) for row in self.rows)
        kept = sum((row.output - 1) * row.kept for row in self.rows)
        batch = max(1, round(self.mean_batch))
        shared = self.kept_sets == "image" or self.merged or self.keep_of_left == 1
        sharing = min(batch, max(1, round(self.questions))) if shared else 1
        sets, rest = divmod(batch, sharing)
        looks = [Look(n, round(kept / steps), round(kept / steps)) for n in [sharing] * sets + [rest] * (rest > 0)]
        cost = costs.decode([round(lengths / steps)] * batch, looks)
        return Call("decode", cost, (cost,), batch, costs.kv_bytes(0, sum(look.later for look in looks)))

    def machine(self, costs: Costs) -> Machine:
        """The run's own machine, calibrated: this run, estimated, takes the seconds it took."""
        calls = self.calls(costs)
        if self.gpu is None:
            return fit_cpu(self.device, calls, self.seconds)
        return roofline(self.gpu.title, self.gpu.rate, self.gpu.bandwidth, self.shares(costs))

    def shares(self, costs: Costs) -> dict[Stage, float]:
        """The share of its GPU's roofline that each stage reached."""
        assert self.gpu is not None
        return shares_of(self.gpu.rate, self.gpu.bandwidth, self.calls(costs), self.seconds)

    @property
    def kv_bytes(self) -> float:
        """A CPU run's memory for keys and values, or the most that it can have been."""
        return CPU_KV if self.kv_gib is None else self.kv_gib * 2**30


def read(url: str, options: Mapping[str, Any]) -> Measured:
    """The run in a folder, local or on S3. Raises ``ValueError`` where there is none or nothing can be learned of it."""
    run = read_run(Storage(url, dict(options)))
    wrong = _unfit(run)
    if wrong:
        raise ValueError(f"from={url!r} {wrong}")
    gpu = None if run.hardware.startswith("CPU") else reported(run.hardware)
    if gpu is None and not run.hardware.startswith("CPU"):
        raise ValueError(f"from={url!r} ran on {run.hardware!r}, which is not in the table of GPUs (jobs/estimation/gpus.py)")
    config, stats = run.config, run.stats
    rows, facts = _rows(run, int(config["max_new_tokens"]))
    part = facts["taken"] / facts["rows"]
    seconds = stats["seconds_per_stage"]
    staged = sum(seconds[stage] for stage in STAGES)
    return Measured(
        name=url,
        model=str(run.record["checkpoint"]["source"]),
        device=run.hardware,
        gpu=gpu,
        itemsize=_ITEMSIZE[str(stats["dtype"])],
        rows=tuple(rows),
        seconds={stage: seconds[stage] * part for stage in STAGES},
        decode_steps=stats["decode_steps"] * part,
        decode_tokens=stats["decode_tokens"] * part,
        busy=staged / stats["actor_seconds"] if stats["actor_seconds"] else None,
        tiles=facts["tiles"],
        questions=facts["questions"],
        prompt=facts["prompt"],
        output=facts["output"],
        keep=facts["keep"],
        k_ratio=float(config["k_ratio"]) if run.policy == "trimmed-llama" else None,
        longest=max(int(config["max_new_tokens"]), *(row.output for row in rows)),
        batch_size=int(config["batch_size"]),
        kv_gib=config["kv_gib"],
        tower_tiles=config["tower_tiles"],
        tower_policy=config["tower_policy"],
        tower_keep=config["tower_keep"],
        kept_sets=config["kept_sets"],
        merged=run.policy == "clusters",
        encode_once=config["image_cache_gib"] > 0,
        peak_sequences=int(stats["peak_sequences"]),
    )


def _unfit(run: Run) -> str | None:
    """Why nothing can be learned of the run."""
    missing = [stage for stage in STAGES if not run.stats["seconds_per_stage"].get(stage)]
    if missing:
        return f"has no seconds of {missing[0]}; it needs answers of some tokens about images"
    if not run.stats["decode_steps"] or not run.stats["decode_tokens"]:
        return "counts no decode steps; it was made by an older version, or its answers have one token"
    if len(run.device_seconds) > 1:
        return f"ran on several kinds of hardware ({', '.join(run.device_seconds)}); give one that ran on one"
    if run.stats["dtype"] not in _ITEMSIZE:
        return f"mixes weights' types ({run.stats['dtype']})"
    return None


def _rows(run: Run, longest: int) -> tuple[list[Row], dict[str, Any]]:
    """The first rows with one image, and means over all of those. Raises ``ValueError`` where there is none."""
    rows: list[Row] = []
    images: dict[str, int] = {}
    tiles: Counter[int] = Counter()
    count = seen = prompt = output = kept = visual = 0
    for table in run.rows([*_COLUMNS, "error"]):
        if seen >= READ_ROWS:
            break
        for row in table.to_pylist():
            if row["error"] is not None:
                continue
            seen += 1
            if row["images"] != 1 or not row["visual_tokens"]:
                continue
            if row["image_digest"] not in images:
                images[row["image_digest"]] = len(images)
                tiles[row["tiles"]] += 1
            count += 1
            prompt += row["prompt_tokens"]
            output += max(1, row["output_tokens"])
            kept += row["kept_visual_tokens"]
            visual += row["visual_tokens"]
            if len(rows) < SAMPLE_ROWS:
                said, asked = max(1, row["output_tokens"]), row["prompt_tokens"]
                held = asked + max(longest, said)
                rows.append(Row(images[row["image_digest"]], row["tiles"], asked, said, row["kept_visual_tokens"], held))
    if not count or count < 0.9 * seen:
        raise ValueError(f"from={run.folder.url!r}: {count:,} of {seen:,} rows have one image, which the model needs")
    if output == count:
        raise ValueError(f"from={run.folder.url!r} has answers of one token, which no decode step gives")
    return rows, {
        "rows": run.answered * count / seen,
        "taken": len(rows),
        "questions": count / len(images),
        "tiles": {number: times / len(images) for number, times in sorted(tiles.items())},
        "prompt": prompt / count,
        "output": output / count,
        "keep": kept / visual,
    }
