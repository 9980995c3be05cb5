"""EViT (arXiv 2202.07800, section 3): rows that the class token looks at least leave, and one stands for them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.tower.policy import Look, TowerPolicy, TowerRows


@dataclass(frozen=True)
class EViT(TowerPolicy):
    """The rows with the most attention of the class tokens stay; the rest are fused into one, the mean by that attention, which
    counts once.

    The paper lets rows leave in three layers, between attention and MLP; here a share leaves behind every layer. A tower with
    several tiles has as many class tokens, whose attention is averaged, and one fused row for all of them; behind the next
    layer it is a row like any other.
    """

    looks_at: ClassVar[frozenset[Look]] = frozenset({"class_attention"})

    def groups(self, rows: TowerRows, left: int) -> Tensor:
        assert rows.class_attention is not None
        order = rows.class_attention.argsort(dim=1, descending=True, stable=True)
        # By rank, all from the last one that may stay in one group.
        ranks = torch.arange(order.shape[1], device=order.device).clamp(max=left - 1).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, ranks)

    def weights(self, rows: TowerRows) -> Tensor:
        assert rows.class_attention is not None
        # Attention that underflows would leave a mean of nothing.
        return rows.class_attention.clamp(min=1e-12)
