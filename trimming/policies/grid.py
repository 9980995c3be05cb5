"""A control: an even spatial stride over every tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, VisualContext, Where, no_scores


@dataclass(frozen=True)
class Grid(KeepShare):
    """Keeps an evenly spaced lattice of patches in each real tile; the class token only once all patches are kept.

    A sample's budget is split evenly over its tiles, the remainder over the first ones. Of features that have been merged,
    which lie anywhere, every so many one stays.
    """

    where: ClassVar[Where] = "features"

    def score(self, context: VisualContext) -> Tensor:
        return no_scores(context)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        chosen = torch.zeros(context.valid.shape, dtype=torch.bool)
        for row, (valid, whole) in enumerate(zip(context.valid.cpu(), budget.tolist(), strict=True)):
            there = valid.view(-1, context.tokens)
            real = there.any(-1).nonzero()[:, 0].tolist()
            if not there[real].all():
                # What has been merged lies on no lattice: evenly in the order of what there is.
                places = valid.nonzero()[:, 0]
                chosen[row, places[(2 * torch.arange(whole) + 1) * len(places) // (2 * whole)]] = True
                continue
            for number, tile in enumerate(real):
                share = whole // len(real) + (number < whole % len(real))
                chosen[row, [tile * context.tokens + i for i in tile_lattice(context.tokens, share)]] = True
        return chosen.to(context.valid.device)


@cache
def tile_lattice(tokens: int, count: int) -> tuple[int, ...]:
    """``count`` positions of a tile of 1 + side² tokens, evenly spaced: rows at an even stride, patches evenly in each."""
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ValueError(f"a tile of {tokens} tokens is not a class token and a square of patches: Grid does not apply")
    if count > side * side:
        return tuple(range(tokens))
    rows = max(math.isqrt(max(0, count - 1)) + 1, -(-count // side)) if count else 0
    positions = []
    for row in range(rows):
        columns = count // rows + (row < count % rows)
        y = (2 * row + 1) * side // (2 * rows)
        positions += [1 + y * side + (2 * column + 1) * side // (2 * columns) for column in range(columns)]
    return tuple(sorted(positions))
