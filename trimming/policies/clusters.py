"""This project's own: features of an image that are alike are one, which counts as often as it has members."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trimming.clustering import Clustering
from trimming.policies.around import Around
from trimming.policies.keep_all import KeepAll
from trimming.policies.policy import Policy


@dataclass(frozen=True)
class Clusters(Around):
    """An image's projected features are clustered as soon as it is encoded, whatever is asked; every cross-attention layer
    projects and caches the clusters' means alone, and adds the logarithm of a cluster's size to its logits.

    Dropping features changes every softmax they stood in. Means that are weighed by their members leave it nearly as it was,
    and exactly so where the members are equal. Class tokens join clusters like any other feature. What may still be dropped is
    ``policy``'s choice, among the clusters.
    """

    keep: float | None = None
    """Share of an image's features that clusters are left of it, in (0, 1]."""
    likeness: float | None = None
    """Or, in its place, the cosine up to which features count as one, in (0, 1]."""
    policy: Policy = field(default_factory=KeepAll)
    """Sees a cluster at the place of its first member alone."""

    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.policy.clustering is not None:
            raise ValueError("features can be clustered once: give a policy that chooses among them")
        _ = self.clustering

    @property
    def clustering(self) -> Clustering:  # type: ignore[override]
        return Clustering(self.keep, self.likeness)
