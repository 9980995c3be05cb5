"""From what was measured to ``cpu.json``: ratios with their spreads, and everything they come from."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import transformers

from benchmarks import language, study
from benchmarks.conditions import commit, processor
from benchmarks.half import HALF
from benchmarks.merging import TENTH
from benchmarks.predicted import captioning_stages, fewer_over_all
from benchmarks.study import Study
from benchmarks.timing import Pass, Passes, quartiles, ratio, spread
from benchmarks.workloads import Workload
from trimming.costs import Costs

AT_LEAST = {
    "captioning_engine_over_peer": 1.4,
    "captioning_generation_engine_over_peer": 2.0,
    "questions_engine_over_peer": 3.5,
    "captioning_half_over_all": 1.12,
    "questions_half_over_all": 1.1,
    "questions_generation_half_over_all": 1.25,
    "decode_half_over_all": 1.3,
    "captioning_tenth_over_all": 1.15,
    "questions_tenth_over_all": 1.15,
    "questions_generation_tenth_over_all": 1.5,
    "decode_tenth_over_all": 3.0,
    "captioning_pooled_over_all": 1.5,
    "captioning_whole_over_all": 2.2,
    "questions_whole_over_all": 1.8,
}
AT_MOST = {
    "captioning_kv_peak_half_over_all": 0.55,
    "questions_kv_peak_half_over_all": 0.55,
    "captioning_kv_peak_tenth_over_all": 0.13,
    "questions_kv_peak_tenth_over_all": 0.13,
    "selection_one_question": 1.03,
    "selection_five_questions": 1.03,
    "clustering_over_tower": 0.05,
}
SELECTIONS = {"captioning": "one_question", "questions": "five_questions"}

Result = dict[str, Any]


def result(done: Study, ray_data: Result | None) -> Result:
    """The contents of ``cpu.json``."""
    ratios, selection = _ratios(done), _selection(done)
    for name, part in selection["over_known"].items():
        ratios[f"selection_{name}"] = {"median": part["median"], "min": part["low"], "max": part["high"]}
    ratios["clustering_over_tower"] = spread(done.clustering)
    whole: Result = {
        "ratios": {name: value["median"] for name, value in ratios.items()},
        "spreads": {name: [value["min"], value["max"]] for name, value in ratios.items()},
        "goals": {"at_least": AT_LEAST, "at_most": AT_MOST},
        "predicted": _predicted(done),
        "captioning": _workload(done, "captioning"),
        "questions": _workload(done, "questions"),
        "four_tiles": _four_tiles(done),
        "growth": _growth(done),
        "shares": {share: _language(taken) for share, taken in done.shares.items()},
        "selection": selection,
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

    def over_all(contender: str, name: str, seconds: Callable[[Pass], float]) -> dict[str, float]:
        passes = done.passes[name]
        return ratio(list(map(seconds, passes[study.CONTINUOUS])), list(map(seconds, passes[contender])))

    def peaks(contender: str, name: str) -> dict[str, float]:
        passes = done.passes[name]
        return ratio(list(map(_peak, passes[contender])), list(map(_peak, passes[study.CONTINUOUS])))

    four = {name: list(map(_decoding, taken)) for name, taken in done.passes["four tiles"].items()}
    fewer: dict[str, dict[str, float]] = {}
    for share, contender, in_four in (("half", study.TRIMMED, study.HALF), ("tenth", study.MERGED, study.MERGED)):
        fewer |= {
            f"captioning_{share}_over_all": over_all(contender, "captioning", _seconds),
            f"questions_{share}_over_all": over_all(contender, "questions", _seconds),
            f"questions_generation_{share}_over_all": over_all(contender, "questions", _generation),
            f"decode_{share}_over_all": ratio(four[in_four], four[study.FULL]),
            f"captioning_kv_peak_{share}_over_all": peaks(contender, "captioning"),
            f"questions_kv_peak_{share}_over_all": peaks(contender, "questions"),
        }
    return {
        "captioning_engine_over_peer": peer_over("captioning", _seconds),
        "captioning_generation_engine_over_peer": peer_over("captioning", _generation),
        "questions_engine_over_peer": peer_over("questions", _seconds),
        **fewer,
        "captioning_pooled_over_all": over_all(study.POOLED, "captioning", _seconds),
        "captioning_whole_over_all": over_all(study.WHOLE, "captioning", _seconds),
        "questions_whole_over_all": over_all(study.WHOLE, "questions", _seconds),
    }


def _predicted(done: Study) -> Result:
    """Under the names of the ratios that fewer features are to reach: with stages bound by operations, and the most that any
    roofline allows."""
    costs = Costs(done.model.config, done.model.dtype.itemsize)
    found: Result = {}
    for share, keep, merged in (("half", HALF, False), ("tenth", TENTH, True)):
        for name in ("captioning", "questions"):
            ratios = fewer_over_all(done.loads[name], costs, done.passes[name][study.CONTINUOUS], keep, merged)
            found[f"{name}_{share}_over_all"] = ratios["end_to_end"]
            found[f"{name}_generation_{share}_over_all"] = ratios["generation"]
    return found


def _seconds(done: Pass) -> float:
    return done.seconds


def _generation(done: Pass) -> float:
    return done.generation


def _peak(done: Pass) -> float:
    return done.measured["peak_cross_kv_bytes"]


def _decoding(done: Pass) -> float:
    """Tokens a second."""
    return done.measured["decode_tokens"] / done.measured["decode_seconds"]


def _workload(done: Study, name: str) -> Result:
    load, passes = done.loads[name], done.passes[name]
    best, by_question = done.best_peer(name, _seconds), done.halves.get(f"{name}, {study.BY_QUESTION}")
    peer, ours = passes[best][0].tokens, passes[study.CONTINUOUS][0].tokens
    return {
        "images": len(load.images),
        "tiles": {str(tiles): load.tiles.count(tiles) for tiles in sorted(set(load.tiles))},
        "rows": len(load.rows),
        "output_tokens": sum(row.length for row in load.rows),
        "k_ratio": done.halves[name].k_ratio,
        **({"k_ratio_by_question": by_question.k_ratio} if by_question else {}),
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


def _language(taken: Sequence[Pass]) -> Result:
    """Medians of passes of prefill and decoding alone."""
    return {name: statistics.median(one.measured[name] for one in taken) for name in taken[0].measured}


def _growth(done: Study) -> Result:
    return {
        str(per_image): {"rows": len(passes[language.FULL][0].tokens)}
        | {name: _language(taken) for name, taken in passes.items()}
        for per_image, passes in done.growth.items()
    }


def _selection(done: Study) -> Result:
    """Trimmed-Llama's seconds of prefill over those of the same features known beforehand: quartiles over pairs of passes."""

    def over(passes: Passes, known: str) -> dict[str, float]:
        seconds = ([one.measured["prefill_seconds"] for one in passes[name]] for name in (language.TRIMMED, known))
        return quartiles([a / b for a, b in zip(*seconds, strict=True)])

    found = {title: done.selection[name] for name, title in SELECTIONS.items()}
    return {
        "prefills": done.amounts.prefills,
        "turns": done.amounts.selection_turns,
        "over_known": {title: over(passes, language.KNOWN) for title, passes in found.items()},
        "over_known_behind": {title: over(passes, language.KNOWN_BEHIND) for title, passes in found.items()},
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
