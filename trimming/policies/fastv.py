"""FastV (arXiv 2403.06764, section 4.1): what the last token of the prompt looks at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimming.policies.policy import KeepShare, Look, VisualContext, Where, given


@dataclass(frozen=True)
class FastV(KeepShare):
    """Ranks features by the attention of the prompt's last row, mean over heads, and keeps the best for all layers behind.

    The paper speaks of the attention received from all tokens; its code takes the last token's alone, and so does this. FastV
    prunes behind the K-th layer of a decoder (K = 2 as published); here that is the first cross-attention layer, whose own
    cache is trimmed too. Text sees the image before it: with several, the last row gives the earlier images no score, and they
    keep one feature each until the last image has all of its own.
    """

    where: ClassVar[Where] = "first_layer"
    looks_at: ClassVar[frozenset[Look]] = frozenset({"recent"})
    recent_rows: ClassVar[int] = 1

    def score(self, context: VisualContext) -> Tensor:
        return given(context.recent, "the last row's attention").mean(1, keepdim=True)
