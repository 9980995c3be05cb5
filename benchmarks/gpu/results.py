"""The contents of ``gpu.json``: what was measured so far, the goals' ratios, and the conditions."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

from benchmarks.conditions import commit
from benchmarks.gpu.bench import Bench, Result

GOALS: Result = {"captioning_engine_over_peer": 3.0, "decode_roofline_share": 0.6, "tower_roofline_share": 0.6}
"""At least; in decode at batches of 32 and more."""
GOAL_BATCH = 32


def result(sections: Result, conditions: Result) -> Result:
    """Ratios first; a section that was not reached is missing, and so are its ratios."""
    whole: Result = {"ratios": ratios(sections), "goals": GOALS, **sections, "conditions": conditions}
    return {name: _rounded(part) for name, part in whole.items()}


def ratios(sections: Result) -> Result:
    """``captioning_engine_over_peer`` and, with ``_trimmed`` and ``_real``, the engine's other ways; the others by policy and
    batch, and by tiles and ``tower_tiles``."""
    found: Result = {}
    captioning = sections.get("captioning", {})
    contenders = captioning.get("contenders", {})
    peer = contenders.get(captioning.get("peer"), {})
    for name, contender in (("", "engine"), ("_trimmed", "engine, trimmed"), ("_real", "engine, real tiles")):
        engine = contenders.get(contender, {})
        if "seconds" in peer and "seconds" in engine:
            found[f"captioning_engine{name}_over_peer"] = peer["seconds"]["median"] / engine["seconds"]["median"]
    decode = sections.get("decode", {})
    for policy in ("full", "half"):
        batches = decode.get(policy, {}).get("batches", {})
        shares = {batch: one["roofline_share"] for batch, one in batches.items() if "roofline_share" in one}
        if shares:
            found.setdefault("decode_roofline_share", {})[policy] = shares
    for tiles, modes in sections.get("tower", {}).items():
        if isinstance(modes, dict):
            shares = {mode: one["roofline_share"] for mode, one in modes.items()}
            found.setdefault("tower_roofline_share", {})[tiles] = shares
    return found


def conditions_of(bench: Bench) -> Result:
    """Where and on what."""
    cuda = bench.device.type == "cuda"
    text, vision = bench.model.config.text_config, bench.model.config.vision_config
    return {
        "commit": commit(),
        "hardware": torch.cuda.get_device_name(bench.device) if cuda else platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(bench.device).total_memory if cuda else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "attention": text._attn_implementation,
        "seed": bench.amounts.seed,
        "model": {
            "parameters": bench.model.num_parameters(),
            "hidden": text.hidden_size,
            "layers": text.num_hidden_layers,
            "cross_attention_layers": text.cross_attention_layers,
            "vocabulary": text.vocab_size,
            "tower_hidden": vision.hidden_size,
            "tower_layers": vision.num_hidden_layers + vision.num_global_layers,
            "tile": vision.image_size,
            "visual_tokens_per_tile": bench.costs.tokens,
        },
        "rates": {
            "matmul_operations_per_second": bench.rates.matmul,
            "copy_bytes_per_second": bench.rates.copy,
            "matmul_side": bench.amounts.matmul,
            "copied_bytes": bench.amounts.copy_bytes,
        },
    }


def _rounded(value: Any) -> Any:
    """Five significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
