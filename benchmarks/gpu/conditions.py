"""Where the GPU benchmark ran, on what, and which model it made."""

from __future__ import annotations

import os
import platform

import torch
import transformers

from benchmarks.conditions import commit
from benchmarks.gpu.bench import Bench, Result


def conditions_of(bench: Bench) -> Result:
    """Of the machine and the versions; needs no model."""
    cuda = bench.device.type == "cuda"
    return {
        "commit": commit(),
        "hardware": torch.cuda.get_device_name(bench.device) if cuda else platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(bench.device).total_memory if cuda else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "size": "tiny" if bench.amounts.tiny else "11b",
        "seed": bench.amounts.seed,
    }


def model_of(bench: Bench) -> Result:
    """The large model, once it is there."""
    text, vision = bench.model.config.text_config, bench.model.config.vision_config
    return {
        "parameters": bench.model.num_parameters(),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "attention": text._attn_implementation,
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "cross_attention_layers": text.cross_attention_layers,
        "vocabulary": text.vocab_size,
        "tower_hidden": vision.hidden_size,
        "tower_layers": vision.num_hidden_layers + vision.num_global_layers,
        "tile": vision.image_size,
        "visual_tokens_per_tile": bench.costs.tokens,
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
