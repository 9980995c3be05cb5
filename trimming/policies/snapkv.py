"""SnapKV (arXiv 2404.14469, section 4), on cross-attention as CSP has it (arXiv 2412.04652): what each head looked at last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, Look, VisualContext, Where, given
from trimming.selection import ratio_budget, top_k


@dataclass(frozen=True)
class SnapKV(KeepShare):
    """In each layer every head of keys keeps its own best features, by the attention of the prompt's last rows, summed over the
    query heads that share it.

    The same share of each image, so that heads keep as many; of an image that none of these rows sees, the first ones. SnapKV
    also smooths scores along the sequence, so that a text's neighbours stay together; neighbours in the order of patches are
    not neighbours on the image, and it is left out. CSP divides a budget between self- and cross-attention, of which Mllama's
    layers have one each, and flattens the softmax of what is left (n-softmax), which is no choice of features and left out too.
    """

    where: ClassVar[Where] = "each_layer"
    looks_at: ClassVar[frozenset[Look]] = frozenset({"recent"})
    recent_rows: ClassVar[int] = 32
    """The observation window; 32 is what SnapKV's LongBench results have."""

    def score(self, context: VisualContext) -> Tensor:
        recent = given(context.recent, "the last rows' attention")
        return recent.unflatten(1, (context.kv_heads, -1)).sum(2)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        chosen = []
        for own, valid in zip(scores.chunk(context.images, -1), context.valid.chunk(context.images, -1), strict=True):
            chosen.append(top_k(own, ratio_budget(self.keep, valid), valid))
        return torch.cat(chosen, -1)
