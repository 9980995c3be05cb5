"""Merging features of an image that are alike, before any text is read: which belong together, and what stands for them.

Shapes: B images of one size, n features each, of width w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimming.merging import first_members, means_by, sums_by

NEIGHBOURS = 5
"""Nearest features, itself among them, whose mean distance says how densely a feature's place is populated."""
MAP_ELEMENTS = 1 << 20
"""Elements of the maps of distances that are worked on at once, but for one image's: 4 MiB in float32, which a processor's
cache holds from one pass to the next."""
ROUNDS = 10
"""In which a likeness finds its centres. The demo's images leave at most 4 of 1,000 features undecided."""
MAP_PASSES = 15
"""How often such a map is written or read, by reading ``Clustering``; those of truth values count a quarter. The few that there
are at once, and the features that are sorted, take less than the tower did before."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """Density peaks (Rodriguez and Laio, Science 344, 2014; with nearest neighbours for density: Du et al., 2016) over cosine
    distances.

    A feature is a centre if no denser one is near it: the ``keep`` × n with the largest product of density and distance to the
    next denser one, or all to which no denser centre is as alike as ``likeness``. Every feature joins the nearest centre.
    One image alone decides, in a fixed number of products of matrices, whatever n is.

    Exactly one of the two is given, in (0, 1].
    """

    keep: float | None = None
    """Share of an image's features that stay, to the nearest, one at least; a cluster fewer where features are equal."""
    likeness: float | None = None
    """Least cosine of a feature to its centre, which other centres do not reach: busy images keep more."""

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.likeness is None):
            raise ValueError(f"keep={self.keep!r} and likeness={self.likeness!r}: give one of them")
        for name, value in (("keep", self.keep), ("likeness", self.likeness)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} must be above 0 and at most 1")

    def __call__(self, features: Tensor) -> Tensor:
        """(B, n) long: the cluster of each of ``features`` (B, n, w), numbered in the order of their first members."""
        batch, count = features.shape[:2]
        own = torch.arange(count, device=features.device).expand(batch, -1)
        if self.keep is not None and round(self.keep * count) >= count:
            return own
        step = max(1, MAP_ELEMENTS // count**2)
        return torch.cat([self._of(part) for part in features.split(step)])

    def _of(self, features: Tensor) -> Tensor:
        count = features.shape[1]
        distances = cosine_distances(features)
        crowded = distances.topk(min(NEIGHBOURS, count), dim=-1, largest=False).values.mean(-1)
        # Of two that are as dense the earlier one counts as denser.
        order = crowded.argsort(dim=-1, stable=True)
        if self.keep is not None:
            rank = torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=order.device).expand_as(order))
            apart = distances.masked_fill(rank[:, None] >= rank[..., None], torch.inf).amin(-1)
            worth = apart * (-crowded).exp()
            stay = max(1, round(self.keep * count))
            # Equal ones by their places.
            centres = worth.argsort(dim=-1, descending=True, stable=True)[:, :stay].sort(dim=-1).values
            found = distances.gather(-1, centres[:, None].expand(-1, count, -1))
        else:
            assert self.likeness is not None
            found = distances.masked_fill(~_centres(distances <= 1 - self.likeness, order)[:, None], torch.inf)
        return _renumbered(found.argmin(-1))


def _centres(alike: Tensor, order: Tensor) -> Tensor:
    """(B, n): features to which no denser centre is alike, as if taken one after the other from the densest on.

    In rounds, as parallel algorithms find maximal independent sets (Luby, SIAM J. Comput. 15, 1986). Each feature looks at the
    densest one that is alike to it and still left: if that is itself, it is a centre; if that is a centre, it goes. Those that
    the rounds leave undecided, at the far end of long chains of ever less dense features, are centres as well.

    Args:
        alike: (B, n, n) bool, pairs of features.
        order: (B, n) long, features from the densest on.
    """
    alike = alike.gather(1, order[..., None].expand_as(alike)).gather(2, order[:, None].expand_as(alike))
    alike.diagonal(dim1=-2, dim2=-1).fill_(True)
    places = torch.arange(order.shape[1], device=order.device)
    left = torch.ones_like(order, dtype=torch.bool)
    for _ in range(ROUNDS):
        # The first of the largest: none is smaller than true.
        densest = (alike & left[:, None]).view(torch.uint8).argmax(-1)
        stays = densest == places
        left &= stays | ~stays.gather(-1, densest)
    return torch.zeros_like(left).scatter_(-1, order, left)


def cosine_distances(features: Tensor) -> Tensor:
    """(B, n, n) float32: one minus the cosines of features (B, n, w)."""
    if features.is_cuda and features.dtype in (torch.bfloat16, torch.float16):
        # On tensor cores, and not rounded to the features' own type, in which likes of 0.99 would be one.
        products = torch.bmm(features, features.mT, out_dtype=torch.float32)
        lengths = products.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=1e-12)
        return 1 - products / lengths[..., None] / lengths[:, None]
    unit = F.normalize(features.float(), dim=-1)
    return torch.baddbmm(unit.new_ones(()), unit, unit.mT, alpha=-1)


def _renumbered(cluster: Tensor) -> Tensor:
    """(B, n) cluster numbers, any of 0 to n - 1, as numbers in the order of first members, without gaps."""
    batch, count = cluster.shape
    places = torch.arange(count, device=cluster.device).expand(batch, -1)
    begins = first_members(cluster, count).gather(-1, cluster)
    # A first member opens the next number.
    return ((begins == places).cumsum(-1) - 1).gather(-1, begins)


@dataclass(frozen=True, slots=True)
class Clustered:
    """What stands for one image's n features: k of them."""

    features: Tensor
    """(k, w): the mean of each cluster, in the features' own type."""
    sizes: Tensor
    """(k,) float32: how many features it stands for."""
    places: Tensor
    """(k,) long, ascending: its first member."""
    cluster: Tensor
    """(n,) long: each feature's."""


def merge_clusters(features: Tensor, cluster: Tensor, sizes: Tensor | None = None) -> list[Clustered]:
    """Each image's clusters, of features (B, n, w) and ``Clustering``'s numbers (B, n).

    ``sizes`` (B, n) float32: how many each feature stands for already, if not for itself alone. The same on every run. Waits
    for the device once.
    """
    count = cluster.shape[1]
    most = cluster.amax(-1) + 1
    counts: list[int] = most.tolist()
    flat = (cluster + (most.cumsum(0) - most)[:, None]).flatten()[None]
    weights = torch.ones_like(flat, dtype=torch.float32) if sizes is None else sizes.reshape(1, -1)
    means = means_by(features.flatten(0, 1)[None], weights, flat, sum(counts))[0]
    members = sums_by(weights[..., None], flat, sum(counts))[0, :, 0]
    places = first_members(flat, sum(counts))[0] % count
    parts = zip(means.split(counts), members.split(counts), places.split(counts), cluster, strict=True)
    return [Clustered(*each) for each in parts]
