"""What policies have in common that leave the choice to another, and do something of their own besides."""

from __future__ import annotations

from torch import Tensor

from trimming.clustering import Clustering
from trimming.policies.policy import Look, Policy, VisualContext, Where


class Around(Policy):
    """Decides as ``policy`` does, in all that a subclass does not say otherwise."""

    policy: Policy

    @property
    def where(self) -> Where:  # type: ignore[override]
        return self.policy.where

    @property
    def looks_at(self) -> frozenset[Look]:  # type: ignore[override]
        return self.policy.looks_at

    @property
    def recent_rows(self) -> int:  # type: ignore[override]
        return self.policy.recent_rows

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.policy.merges

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        return self.policy.weighs

    @property
    def clustering(self) -> Clustering | None:  # type: ignore[override]
        return self.policy.clustering

    @property
    def slices(self) -> bool:  # type: ignore[override]
        return self.policy.slices

    def score(self, context: VisualContext) -> Tensor:
        return self.policy.score(context)

    def budget(self, context: VisualContext) -> Tensor:
        return self.policy.budget(context)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        return self.policy.pick(scores, budget, context)

    def merge(self, kept: Tensor, context: VisualContext) -> Tensor:
        return self.policy.merge(kept, context)

    def key_width(self, head_dim: int) -> int:
        return self.policy.key_width(head_dim)

    def channels(self, query: Tensor, key: Tensor) -> Tensor:
        return self.policy.channels(query, key)
