"""No trimming: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimming.policies.policy import Policy, VisualContext, Where, no_scores


@dataclass(frozen=True)
class KeepAll(Policy):
    """Keeps every valid feature. Padding tiles go all the same under Meta's rows, where nothing ever attends to them."""

    where: ClassVar[Where] = "features"

    def score(self, context: VisualContext) -> Tensor:
        return no_scores(context)

    def budget(self, context: VisualContext) -> Tensor:
        return context.valid.sum(-1)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        return context.valid
