"""torch's attention backends at the engine's shapes, known and new ones: cuDNN builds a plan for each new shape."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.bench import Bench, Result
from benchmarks.gpu.roofline import each_seconds

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class AttentionShapes(TorchFunctionMode):
    """Counts the calls to attention, and their different shapes: with cuDNN each of these would cost a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.shapes: set[tuple[Any, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            self.shapes.add(tuple((tuple(t.shape), t.stride()) for t in args[:3]))
        return func(*args, **(kwargs or {}))


def compare_backends(bench: Bench) -> Result:
    """Seconds by backend: ``tower`` of one layer's attention on images of four tiles, with the first call apart, and of causal
    attention over one prompt, of a length that is new to the process (``prefill_new``) and again (``prefill_known``)."""
    vision, text = bench.model.config.vision_config, bench.model.config.text_config
    heads, width = vision.attention_heads, vision.hidden_size // vision.attention_heads
    rows = vision.max_num_tiles * (bench.costs.tokens + -bench.costs.tokens % 8)
    # As a projection leaves them: heads beside each other in a row.
    states = _random(bench, bench.amounts.tower_images, rows, heads, width).transpose(1, 2)
    found: Result = {}
    for offset, (name, backend) in enumerate(BACKENDS.items()):
        one: Result = {}
        found[name] = one
        try:
            with sdpa_kernel([backend]):
                tower = each_seconds(bench.device, lambda: F.scaled_dot_product_attention(states, states, states), 4)
                one |= {"tower": statistics.median(tower[1:]), "tower_first": tower[0]}
                firsts, later = _prefills(bench, text.num_attention_heads, text.num_key_value_heads, offset)
                one |= {"prefill_new": statistics.median(firsts), "prefill_known": statistics.median(later)}
        except RuntimeError as error:
            # Not on this device, in this dtype, or with grouped heads.
            one["error"] = str(error).partition("\n")[0]
    return found


def _prefills(bench: Bench, heads: int, kv_heads: int, offset: int) -> tuple[list[float], list[float]]:
    width = bench.costs.geometry.head_dim
    firsts, later = [], []
    for number in range(bench.amounts.attention_lengths):
        # Odd lengths that neither backend has seen, nor the other has made torch see.
        length = 41 + 26 * number + 2 * offset
        query, key = _random(bench, 1, heads, length, width), _random(bench, 1, kv_heads, length, width)

        def run(query: Tensor = query, key: Tensor = key) -> Tensor:
            return F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)

        seconds = each_seconds(bench.device, run, 3)
        firsts.append(seconds[0])
        later += seconds[1:]
    return firsts, later


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=bench.model.dtype, device=bench.device)
