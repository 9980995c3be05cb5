"""ZipVL (arXiv 2410.08584, section 4.1): as many features as hold a share of the attention, in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import Policy, VisualContext, Where, check_ratio, given
from trimming.selection import top_k


@dataclass(frozen=True)
class ZipVL(Policy):
    """Each layer keeps the fewest features whose attention adds up to ``mass`` of all, by its own attention: the sharper a
    layer's attention, the less it keeps. Attention is the mean over heads and over the text rows that see the image.

    Accumulated scores decide how many, and here which: the paper ranks by scores over the number of rows that see a token,
    which is one number for all features of an image; with several images, those that more rows see count for more. The paper's
    prefill attends to important tokens alone, found by probe rows; here it attends to all, and decoding to what is kept.
    """

    mass: float
    """Share of the attention, in (0, 1]; the paper's τ."""
    where: ClassVar[Where] = "each_layer"

    def __post_init__(self) -> None:
        check_ratio("mass", self.mass)

    def score(self, context: VisualContext) -> Tensor:
        return given(context.attention, "a layer's attention").mean(1, keepdim=True)

    def budget(self, context: VisualContext) -> Tensor:
        scores = self.score(context)[:, 0].double().masked_fill(~context.valid, 0)
        ranked = scores.sort(-1, descending=True).values.cumsum(-1)
        # Rounding must not leave the whole short of itself.
        wanted = self.mass * ranked[:, -1:] * (1 - 1e-12)
        count = (ranked < wanted).sum(-1) + 1
        valid = context.valid.sum(-1)
        return torch.minimum(valid if self.mass == 1 else count, valid)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        return top_k(scores, budget, context.valid)[:, 0]
