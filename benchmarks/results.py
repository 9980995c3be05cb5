"""From what was measured to ``cpu.json``: ratios with their spreads, and everything they come from."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import reduce
from operator import add
from typing import Any

import torch
import transformers

from benchmarks import study
from benchmarks.conditions import commit, processor
from benchmarks.study import Study
from benchmarks.timing import Pass, ratio, spread
from benchmarks.workloads import CAPTION_PROMPT, Workload
from trimming.costs import Costs, Stages
from trimming.engine.vision import TowerTiles

AT_LEAST = {
    "captioning_engine_over_peer": 1.4,
    "captioning_generation_engine_over_peer": 2.0,
    "questions_engine_over_peer": 3.5,
    "half_over_all": 1.3,
}
AT_MOST = {"kv_peak_half_over_all": 0.55}

Result = dict[str, Any]


def result(done: Study, ray_data: Result | None) -> Result:
    """The contents of ``cpu.json``."""
    ratios = _ratios(done)
    whole: Result = {
        "ratios": {name: value["median"] for name, value in ratios.items()},
        "spreads": {name: [value["min"], value["max"]] for name, value in ratios.items()},
        "goals": {"at_least": AT_LEAST, "at_most": AT_MOST},
        "captioning": _workload(done, "captioning"),
        "questions": _workload(done, "questions"),
        "four_tiles": _four_tiles(done),
        "selection": _selection(done),
        "ray_data": ray_data,
        "conditions": _conditions(done),
    }
    return {name: _rounded(part) for name, part in whole.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def _ratios(done: Study) -> dict[str, dict[str, float]]:
    def peer_over(name: str, seconds: Callable[[Pass], float]) -> dict[str, float]:
        """Time is the inverse of speed: the peer's stands above."""
        passes = done.passes[name]
        best = passes[done.best_peer(name, seconds)]
        return ratio(list(map(seconds, best)), list(map(seconds, passes[study.CONTINUOUS])))

    captioning, four = done.passes["captioning"], done.passes["four tiles"]
    peaks = [[each.measured["peak_cross_kv_bytes"] for each in captioning[n]] for n in (study.TRIMMED, study.CONTINUOUS)]
    return {
        "captioning_engine_over_peer": peer_over("captioning", _seconds),
        "captioning_generation_engine_over_peer": peer_over("captioning", _generation),
        "questions_engine_over_peer": peer_over("questions", _seconds),
        "half_over_all": ratio(list(map(_decoding, four[study.HALF])), list(map(_decoding, four[study.FULL]))),
        "kv_peak_half_over_all": ratio(*peaks),
    }


def _seconds(done: Pass) -> float:
    return done.seconds


def _generation(done: Pass) -> float:
    return done.generation


def _decoding(done: Pass) -> float:
    """Tokens a second."""
    return done.measured["decode_tokens"] / done.measured["decode_seconds"]


def _workload(done: Study, name: str) -> Result:
    load, passes = done.loads[name], done.passes[name]
    best = done.best_peer(name, _seconds)
    peer, ours = passes[best][0].tokens, passes[study.CONTINUOUS][0].tokens
    return {
        "images": len(load.images),
        "tiles": {str(tiles): load.tiles.count(tiles) for tiles in sorted(set(load.tiles))},
        "rows": len(load.rows),
        "output_tokens": sum(row.length for row in load.rows),
        "k_ratio": done.halves[name].k_ratio,
        "peer": best,
        "peer_generation": done.best_peer(name, _generation),
        "sweep": {
            str(size): {"rows": len(swept.tokens), "rows_per_second": len(swept.tokens) / swept.seconds}
            for size, swept in done.sweeps[name].items()
        },
        "contenders": {each: _contender(load, taken) for each, taken in passes.items()},
        # Matrices of other shapes add in another order: greedy choices between near-equals may differ.
        "same_output_rows": sum(a == b for a, b in zip(peer, ours, strict=True)) / len(peer),
    }


def _contender(load: Workload, taken: Sequence[Pass]) -> Result:
    return {
        "runs": len(taken),
        "seconds": spread([one.seconds for one in taken]),
        "images_per_second": len(load.images) / statistics.median(map(_seconds, taken)),
        "preparing_seconds": statistics.median(one.preparing for one in taken),
        "tower_seconds": statistics.median(one.tower for one in taken),
        "generation_seconds": spread([one.generation for one in taken]),
        **{name: statistics.median(one.measured[name] for one in taken) for name in taken[0].measured},
    }


def _four_tiles(done: Study) -> Result:
    passes = done.passes["four tiles"]
    return {
        "images": len(done.four_tiles.images),
        "output_tokens": sum(row.length for row in done.four_tiles.rows),
        "kv_budget_bytes": done.kv_budget,
        "k_ratio": done.halves["four tiles"].k_ratio,
        "contenders": {
            name: {"decode_tokens_per_second": spread(list(map(_decoding, taken)))} | _contender(done.four_tiles, taken)
            for name, taken in passes.items()
        },
    }


def _selection(done: Study) -> Result:
    seconds = {name: [one.measured["prefill_seconds"] for one in taken] for name, taken in done.selection.items()}
    costs = ratio(seconds[study.TRIMMED], seconds[study.RANDOM])
    taken = done.selection[study.TRIMMED]
    return {
        "prefills": len(taken[0].tokens),
        "turns": len(taken),
        "prefill_seconds": {name: spread(values) for name, values in seconds.items()},
        "keep_fraction": {name: taken[0].measured["keep_fraction"] for name, taken in done.selection.items()},
        "cost": {name: value - 1 for name, value in costs.items()},
    }


def _conditions(done: Study) -> Result:
    config = done.model.config
    text, vision = config.text_config, config.vision_config
    return {
        "commit": commit(),
        "hardware": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": str(done.model.dtype).removeprefix("torch."),
        "attention": text._attn_implementation,
        "seed": done.amounts.seed,
        "rounds": len(done.passes["captioning"][study.CONTINUOUS]),
        "max_sequences": done.amounts.max_sequences,
        "model": {
            "parameters": done.model.num_parameters(),
            "hidden": text.hidden_size,
            "layers": text.num_hidden_layers,
            "cross_attention_layers": text.cross_attention_layers,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "vocabulary": text.vocab_size,
            "tower_hidden": vision.hidden_size,
            "tower_layers": vision.num_hidden_layers + vision.num_global_layers,
            "tile": vision.image_size,
            "visual_tokens_per_tile": Costs(config).tokens,
        },
        "captioning_operations": _operations(done),
    }


def captioning_stages(load: Workload, costs: Costs, tower_tiles: TowerTiles) -> Stages:
    """Costs of all captions, each by itself."""
    rows = [(load.tiles[row.image], row.length) for row in load.rows]
    each = (costs.batch(tiles=tiles, prompt=CAPTION_PROMPT, output=length, tower_tiles=tower_tiles) for tiles, length in rows)
    return reduce(add, each)


def _operations(done: Study) -> Result:
    """Of the mean captioning image."""
    load = done.captioning
    costs = Costs(done.model.config, done.model.dtype.itemsize)
    exact, real = (captioning_stages(load, costs, tiles) for tiles in ("all", "real"))
    return {
        "multiply_adds": {f.name: getattr(exact, f.name).operations // 2 // len(load.rows) for f in fields(exact)},
        "tower_share": exact.tower_share,
        "tower_share_without_padding_tiles": real.tower_share,
    }
