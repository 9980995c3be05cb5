"""Trimmed-Llama (arXiv 2504.00557, section 3): the union of what the first cross-attention layer's heads look at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimming.policies.policy import Policy, VisualContext, Where, check_ratio, given
from trimming.selection import ratio_budget, top_k


@dataclass(frozen=True)
class TrimmedLlama(Policy):
    """Each head of the first cross-attention layer takes its top ``k_ratio`` × n features; their union stays.

    So the kept share is decided by each sample: the more the heads agree, the less is kept. Where the paper is silent:

    - n counts a sample's valid features, not its padding tiles;
    - a head's score of a feature is its attention summed over the text rows that see the image (no padding rows, no rows
      before the image token);
    - with several images in a prompt, every image keeps at least its best feature;
    - the first layer's own cache is trimmed too, once its prefill has attended to everything.
    """

    k_ratio: float = 0.25
    """K of the paper, in (0, 1]. Published for the 11B: 0.25 keeps 61.5 % of the features, 0.05 keeps 14.2 %."""
    where: ClassVar[Where] = "first_layer"

    def __post_init__(self) -> None:
        check_ratio("k_ratio", self.k_ratio)

    def score(self, context: VisualContext) -> Tensor:
        return given(context.attention, "the first cross-attention layer's attention")

    def budget(self, context: VisualContext) -> Tensor:
        return ratio_budget(self.k_ratio, context.valid)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        return top_k(scores, budget, context.valid).any(1)
