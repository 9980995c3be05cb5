"""Pure tensor functions that policies are made of: budgets, selectors and the ragged gather's index.

Shapes: B samples, H heads, N positions on the model's images × tiles × tokens axis, L kept positions of the longest sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ratio_budget(ratio: float, valid: Tensor) -> Tensor:
    """How many features ``ratio`` stands for: that share of each sample's *valid* features, to the nearest, at least one.

    Counting padding tiles too would mean that an image of one tile in four is never trimmed.

    Args:
        ratio: in (0, 1].
        valid: (B, N) bool.

    Returns:
        (B,) long; 0 for a sample without valid features.
    """
    count = valid.sum(-1)
    return torch.where(count > 0, (count.double() * ratio).round().long().clamp(min=1), 0)


def top_k(scores: Tensor, budget: Tensor, valid: Tensor) -> Tensor:
    """The ``budget`` best valid positions of every row of scores; ties go to the lower position.

    Args:
        scores: (B, H, N) float.
        budget: (B,) long.
        valid: (B, N) bool.

    Returns:
        (B, H, N) bool.
    """
    ranked = scores.masked_fill(~valid[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < budget[:, None, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked, chosen.expand_as(ranked)) & valid[:, None]


def at_least_one_per_image(keep: Tensor, scores: Tensor, valid: Tensor, images: int) -> Tensor:
    """``keep`` with the best-scored feature of every image that would have lost all of its own.

    Args:
        keep: (B, N) bool.
        scores: (B, N) float.
        valid: (B, N) bool.
        images: images a sample; N is a multiple of it.

    Returns:
        (B, N) bool.
    """
    kept, there = (t.unflatten(-1, (images, -1)) for t in (keep, valid))
    lost = there.any(-1) & ~kept.any(-1)
    best = scores.unflatten(-1, (images, -1)).masked_fill(~there, -torch.inf).argmax(-1, keepdim=True)
    return kept.scatter(-1, best, kept.gather(-1, best) | lost[..., None]).flatten(-2)


def ragged_index(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept positions in ascending order, padded to the batch's longest sample (and to 1, as kernels want a key).

    Args:
        keep: (B, N) bool.

    Returns:
        index: (B, L) long, 0 where padded.
        present: (B, L) bool, False where padded.
    """
    counts = keep.sum(-1)
    length = max(1, int(counts.max()))
    present = torch.arange(length, device=keep.device) < counts[:, None]
    # A stable sort of the dropped flag brings the kept positions to the front in their own order.
    index = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :length]
    return index.masked_fill(~present, 0), present


def merged(features: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """``features`` with every kept row replaced by the mean of itself and the rows that are merged into it.

    Averages of features rather than of keys: a mean of normed keys is shorter than each of them.

    Args:
        features: (N, width).
        targets: (N,) long, the kept position that each row is merged into, -1 for none.
        keep: (N,) bool.

    Returns:
        (N, width); rows that are not kept come back as they are.
    """
    goes = (targets >= 0) & ~keep
    sums = features.float().index_add(0, targets[goes], features[goes].float())
    counts = torch.ones(len(features), device=features.device).index_add(
        0, targets[goes], torch.ones(int(goes.sum()), device=features.device)
    )
    return torch.where(keep[:, None], (sums / counts[:, None]).to(features.dtype), features)


def cosine_distances(features: Tensor) -> Tensor:
    """One minus the cosine of each two rows of (n, width): (n, n) float32, never negative, 0 on the diagonal."""
    unit = F.normalize(features.float(), dim=-1)
    # What rounding leaves of nothing must not rank points that lie on each other.
    return (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)


def farthest_points(distances: Tensor, count: int, first: int, weights: Tensor | None = None) -> Tensor:
    """Greedy max–min choice: ``first``, then always the point whose distance to those chosen, times its weight, is largest.

    Args:
        distances: (n, n), 0 on the diagonal.
        count: how many to choose, at most n.
        first: the first one.
        weights: (n,), none negative; default 1.

    Returns:
        (count,) long, in the order of their choice; ties go to the lower one.
    """
    nearest = torch.full_like(distances[0], torch.inf)
    taken = torch.zeros(len(distances), dtype=torch.bool, device=distances.device)
    chosen = torch.full((count,), first, device=distances.device)
    for place in range(1, count):
        # A slice of one: a Python number as an index would synchronise with the device.
        last = chosen[place - 1 : place]
        # An assignment of a number by index would send it over, and wait.
        taken.index_fill_(0, last, True)
        nearest = torch.minimum(nearest, distances[last][0])
        worth = nearest if weights is None else nearest * weights
        # Points that lie on chosen ones are still to be had once nothing else is.
        chosen[place] = worth.masked_fill(taken, -torch.inf).argmax()
    return chosen
