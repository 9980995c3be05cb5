"""Pure tensor functions that policies are made of: budgets, selectors and the ragged gather's index.

Shapes: B samples, H heads, N positions on the model's images × tiles × tokens axis, L kept positions of the longest sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trimming.attention import CHUNK_ELEMENTS
from trimming.merging import sorted_sums


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
    ranked = scores.masked_fill(~valid[:, None], -torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    # Only the best are sorted, and without their places, which topk chooses among equals as it likes.
    best = ranked.topk(max(1, int(budget.max())), dim=-1).values
    budget = budget[:, None, None]
    least = best.gather(-1, (budget - 1).clamp(min=0).expand(*best.shape[:2], 1))
    above, level = (ranked > least) & valid[:, None], (ranked == least) & valid[:, None]
    left = budget - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= left))


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


def merged(features: Tensor, sizes: Tensor, targets: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """``features`` with every kept row replaced by the mean of itself and the rows that are merged into it.

    Averages of features rather than of keys: a mean of normed keys is shorter than each of them. The same on every run.

    Args:
        features: (N, width).
        sizes: (N,) float32, how many features each row stands for.
        targets: (N,) long, the kept position that each row is merged into, -1 for none.
        keep: (N,) bool.

    Returns:
        (N, width) and (N,) float32; rows that are not kept come back as they are.
    """
    own = torch.arange(len(features), device=features.device)
    into = torch.where((targets >= 0) & ~keep, targets, own)[None]
    weights = sorted_sums(sizes[None, :, None], into, len(own))[0]
    means = (sorted_sums((features.float() * sizes[:, None])[None], into, len(own))[0] / weights).to(features.dtype)
    return torch.where(keep[:, None], means, features), torch.where(keep, weights[:, 0], sizes)


def merged_into(real: Tensor, firsts: Tensor, keep: Tensor, targets: Tensor | None) -> Tensor:
    """``SampleTrim.merged_into``.

    Args:
        real: (N,) bool, features of real tiles.
        firsts: one of them each, long: the place of the feature that it was clustered into, its own where it was not, −1 where
            it had left before.
        keep: (N,) bool, what stayed of these.
        targets: (N,) long, the kept position that each was merged into when what stays was chosen, or -1; None where the rest
            goes.

    Returns:
        (N,) long.
    """
    into = torch.full(real.shape, -1)
    rest = -torch.ones_like(firsts) if targets is None else targets[firsts]
    into[real] = torch.where((firsts >= 0) & ~keep[firsts], rest, firsts)
    return into


def unit_rows(features: Tensor) -> Tensor:
    """The rows of (n, width) at length one, in float32: their products are cosines."""
    return F.normalize(features.float(), dim=-1)


def nearest_distances(unit: Tensor) -> Tensor:
    """(n,) of ``unit_rows`` (n, width), at least one: one minus the cosine with the most similar other row, never negative;
    infinite for one row alone."""
    found = []
    step = max(1, CHUNK_ELEMENTS // len(unit))
    for start in range(0, len(unit), step):
        cosines = unit[start : start + step] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(1 - cosines.amax(-1))
    return torch.cat(found).clamp_(min=0)


def farthest_points(unit: Tensor, count: int, first: int, weights: Tensor | None = None) -> Tensor:
    """Greedy max–min choice: ``first``, then always the row whose distance to those chosen, times its weight, is largest.

    A distance is one minus the cosine. Those to one chosen row are computed at a time: all together would take n × n memory.

    Args:
        unit: (n, width), of ``unit_rows``.
        count: how many to choose, at most n.
        first: the first one.
        weights: (n,), none negative; default 1.

    Returns:
        (count,) long, in the order of their choice; ties go to the lower one.
    """
    worth = torch.full_like(unit[:, 0], torch.inf)
    chosen = torch.full((count,), first, device=unit.device)
    for place in range(1, count):
        # A slice of one: a Python number as an index would synchronise with the device.
        last = chosen[place - 1 : place]
        # Rounding may leave a little less than nothing.
        distances = (1 - unit @ unit[last][0]).clamp_(min=0)
        torch.minimum(worth, distances if weights is None else distances.mul_(weights), out=worth)
        # Rows that lie on chosen ones are still to be had once nothing else is; chosen ones are not.
        worth.index_fill_(0, last, -torch.inf)
        chosen[place] = worth.argmax()
    return chosen
