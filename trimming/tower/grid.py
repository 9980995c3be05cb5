"""A control: an even grid of rows goes on, coarser and coarser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trimming.tower.policy import TowerPolicy, TowerRows
from trimming.tower.random import first_ranked

BITS = 12
"""A side of a tile's grid has fewer than 2 to the power of it patches."""


@dataclass(frozen=True)
class GridRows(TowerPolicy):
    """Of every tile the same patches, spread evenly at any number: in the order of the bits of their coordinates, the lowest
    first, so that every second row and column leaves before the others are touched."""

    def groups(self, rows: TowerRows, left: int) -> Tensor:
        rank = _ranks(rows.tokens, rows.places.device)
        # Tile after tile within a rank, so that each has as many.
        return first_ranked(rank[rows.places % rows.tokens] * rows.tiles + rows.places // rows.tokens, left)


@cache
@torch.inference_mode(False)
def _ranks(tokens: int, device: torch.device) -> Tensor:
    """(tokens,) long: the order in which a tile's patches stay, the last to leave first."""
    side = math.isqrt(tokens - 1)
    patches = torch.arange(tokens - 1)
    y, x = patches // side, patches % side
    order = torch.zeros_like(patches)
    for bit in range(BITS):
        # A patch whose coordinates have low bits goes early; of a checkerboard's halves the one with odd sums first.
        order = order * 4 + ((y ^ x) >> bit & 1) * 2 + (y >> bit & 1)
    return torch.cat([torch.zeros(1, dtype=torch.long), order.argsort(stable=True).argsort()]).to(device)
