"""How much the text attends to each visual feature, without ever holding all rows' attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one chunk's attention map: 64 MB in fp32.
CHUNK_ELEMENTS = 1 << 24


def summed_attention(query: Tensor, key: Tensor, mask: Tensor | None, rows: Tensor, scaling: float) -> Tensor:
    """Attention probabilities of a cross-attention layer, summed over the text rows that count.

    Args:
        query: (B, H, Q, D), normalised as the layer normalises it.
        key: (B, KV, N, D); heads are shared in groups of H / KV.
        mask: (B, 1, Q, N) additive, or None.
        rows: (B, Q) bool, the rows that count.
        scaling: what the products are multiplied with.

    Returns:
        (B, H, N) float32; every sample's heads each sum to its number of counting rows.
    """
    batch, heads, _, width = query.shape
    kv_heads, positions = key.shape[1], key.shape[2]
    total = torch.zeros(batch, heads, positions, dtype=torch.float32, device=query.device)
    transposed = key.transpose(-1, -2)
    step = max(1, CHUNK_ELEMENTS // (batch * heads * positions))
    for chunk in rows.any(0).nonzero()[:, 0].split(step):
        # Query heads of one group lie next to each other: they become rows of their key head's product.
        part = query[:, :, chunk].reshape(batch, kv_heads, -1, width)
        logits = (part @ transposed * scaling).view(batch, heads, len(chunk), positions)
        if mask is not None:
            logits = logits + mask[:, :, chunk]
        weights = logits.softmax(-1, dtype=torch.float32)
        total += torch.einsum("bhqn,bq->bhn", weights, rows[:, chunk].float())
    return total
