"""One layer of the tower over rows that may stand for several each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimming.tower.rows import Rows

CHANNELS = 8
"""Channels beside a head's own that carry what is added to logits: kernels want a multiple of eight."""


@dataclass(slots=True)
class Seen:
    """What to take a note of while a layer attends."""

    wants_keys: bool
    class_rows: Tensor | None
    """(B, tiles) long: where the class tokens are, whose attention is wanted."""
    keys: Tensor | None = None
    """See ``TowerRows.keys``; of all rows of real tiles."""
    class_attention: Tensor | None = None
    """See ``TowerRows.class_attention``; of all rows of real tiles."""

    def look(self, query: Tensor, key: Tensor, rows: Rows, scaling: float) -> None:
        """query (B, H, Q, D) and key (B, H, K, D), rows of real tiles first."""
        if self.wants_keys:
            self.keys = key[:, :, : rows.real].mean(1, dtype=torch.float32)
        if self.class_rows is not None:
            places = self.class_rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
            logits = (query.gather(2, places) @ key.transpose(-1, -2)).float() * scaling
            if rows.bias is not None:
                logits = logits + rows.bias[:, None, None]
            self.class_attention = logits.softmax(-1)[..., : rows.real].mean((1, 2))


def run_layer(layer: Any, rows: Rows, seen: Seen, count: int) -> Tensor:
    """(B, count, width): the layer's first ``count`` rows, from all of them."""
    attention, states, real, bias = layer.self_attn, rows.states, rows.real, rows.bias
    normed = layer.input_layernorm(states)
    heads = (attention.num_heads, attention.head_dim)
    query = attention.q_proj(normed[:, :count]).unflatten(-1, heads).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
    value = attention.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
    seen.look(query, key, rows, attention.scaling)
    attended = weighed_attention(query[:, :, :real], key, value, attention.scaling, bias).transpose(1, 2)
    if count > real:
        # Padding sees none of its like. Where rows of real tiles do not weigh, nothing is left to add.
        seen_bias = None if bias is None or rows.sizes is None or not rows.weighs else bias[:, :real]
        blind = weighed_attention(query[:, :, real:], key[:, :, :real], value[:, :, :real], attention.scaling, seen_bias)
        attended = torch.cat([attended, blind.transpose(1, 2)], 1)
    attended = attention.o_proj(attended.flatten(2))
    states = states[:, :count]
    states = states + (layer.gate_attn.tanh() * attended if layer.is_gated else attended)
    forward = layer.mlp(layer.post_attention_layernorm(states))
    return states + (layer.gate_ffn.tanh() * forward if layer.is_gated else forward)


def weighed_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """(B, H, Q, D) of query (B, H, Q, D), key and value (B, H, K, D); ``bias`` (B or 1, K) float32 is added to the logits.

    Flash kernels take no mask, and half types would round what is added, e.g. log 100 by 1 %. So it rides in the product: in
    two channels of the keys, the second with what the first one's rounding left out, to which the queries say 1. A head of 80
    channels has room for them in the kernels' blocks. For float32 on a CPU a mask is cheaper, as it needs no copies.
    """
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling)
    batch, _, rows, width = query.shape
    if query.dtype == torch.float32 and not query.is_cuda:
        mask = bias[:, None, None].expand(batch, -1, rows, -1)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    query, key, value = (F.pad(t, (0, CHANNELS)) for t in (query, key, value))
    query[..., width : width + 2] = 1
    wanted = (bias / scaling)[:, None]
    key[..., width] = wanted.to(key.dtype)
    key[..., width + 1] = (wanted - key[..., width]).to(key.dtype)
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)[..., :width]
