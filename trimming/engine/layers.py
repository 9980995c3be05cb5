"""Pieces of the language model's layers that prefill and decode have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import MllamaForConditionalGeneration

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All of torch's attention but cuDNN's, which torch prefers on Hopper: it builds a plan for each new shape, 0.4 seconds each by
public reports (transformers issue 48163), and prompts and kept sets are of a new length nearly every time."""


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Where the engine computes: with ``BACKENDS``, and with ``device`` as the current one, which Triton, captures and
    synchronisation go by."""
    with sdpa_kernel(BACKENDS):
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


MLP_ROWS = 8192
"""Rows that go through an MLP at once, between whose projections they are several times as wide."""


class Rotary:
    """Rotary position embeddings of every position that the model knows, tabulated once: 67 MB for the 11B in bf16.

    Captured graphs read the tables where they lie, so that nothing may ever replace them.
    """

    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        like = torch.zeros(1, dtype=model.dtype, device=model.device)
        positions = torch.arange(model.config.text_config.max_position_embeddings, device=model.device)
        cos, sin = model.model.language_model.rotary_emb(like, positions[None])
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, these for ``rotate``, (n, 1, head_dim) of positions (n,)."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (n, heads, head_dim). The two halves of a head's channels are pairs, as transformers has them; the
    first half's sines come negated."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def norm(module: Any, states: Tensor) -> Tensor:
    """``MllamaTextRMSNorm`` in one kernel."""
    return F.rms_norm(states, module.weight.shape, module.weight, module.variance_epsilon)


def self_queries(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated queries (n, heads, D) of a self-attention layer, of normed states (n, width)."""
    return rotate(attention.q_proj(states).unflatten(-1, (-1, attention.head_dim)), cos, sin)


def self_projections(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated keys and values (n, KV, D) of a self-attention layer, of normed states (n, width)."""
    key = rotate(attention.k_proj(states).unflatten(-1, (-1, attention.head_dim)), cos, sin)
    return key, attention.v_proj(states).unflatten(-1, (-1, attention.head_dim))


def self_attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Tensor:
    """(n, heads × D) of queries (n, heads, D) over keys and values (m, KV, D) of one prompt: each its own and those before it
    where ``causal``, else all of them."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    grouped = _groups_are_fast(key)
    if not grouped:
        k, v = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=grouped)
    return out[0].transpose(0, 1).flatten(1)


def _groups_are_fast(key: Tensor) -> bool:
    """Not in fp32 on CUDA: torch's fast kernels take no grouped heads there, and its fallback holds the whole attention map."""
    return not (key.is_cuda and key.dtype == torch.float32)


def mlp(module: Any, states: Tensor) -> Tensor:
    """``module`` of states (n, width), ``MLP_ROWS`` at a time: a prompt of 130,000 tokens would take 11 GB at once."""
    if len(states) <= MLP_ROWS:
        done: Tensor = module(states)
        return done
    return torch.cat([module(part) for part in states.split(MLP_ROWS)])


def cross_queries(attention: Any, states: Tensor) -> Tensor:
    """Queries (n, heads, D) of a cross-attention layer, of normed states (n, width)."""
    return norm(attention.q_norm, attention.q_proj(states).unflatten(-1, (-1, attention.head_dim)))


def cross_projections(attention: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (n, KV, D) of a cross-attention layer, of features (n, width)."""
    key = norm(attention.k_norm, attention.k_proj(features).unflatten(-1, (-1, attention.head_dim)))
    return key, attention.v_proj(features).unflatten(-1, (-1, attention.head_dim))


def crosses(model: MllamaForConditionalGeneration) -> list[bool]:
    """Of each layer of the language model, whether it is a cross-attention layer."""
    config = model.config.text_config
    return [index in config.cross_attention_layers for index in range(config.num_hidden_layers)]


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """(n, heads × D) of queries (n, heads, D) over keys and values (KV, L, D), all of them seen; ``bias``, (L,) or (KV, L)
    float32, is added to scaled logits."""
    folded = fold(query, len(key))[None]
    attended = F.scaled_dot_product_attention(folded, key[None], value[None], as_mask(bias, folded), scale=scaling)
    return unfold(attended[0], len(query))


def as_mask(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """``bias``, (L,) or (KV, L), as a mask for all rows of queries (B, KV, n, D). torch's kernels want it in their dtype, which
    rounds the weight of a cluster of 300 by up to 1.6 % in bf16, and begin at whole vectors: a part of another may not."""
    return None if bias is None else bias.to(query.dtype, copy=True).unsqueeze(-2).expand(*query.shape[:3], -1)


def fold(query: Tensor, kv_heads: int) -> Tensor:
    """Queries (n, heads, D) as (KV, heads of a group × n, D): a key head's queries are rows of one product, and no key is
    repeated."""
    return query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def unfold(attended: Tensor, rows: int) -> Tensor:
    """(KV, heads of a group × n, D) back to (n, heads × D), for the output projection."""
    return attended.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1)
