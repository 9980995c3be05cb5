"""This project's own: neighbours on the patch grid merge where they are alike, by the rules of a quadtree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimming.tower.policy import Merging, TowerRows


@dataclass(frozen=True)
class Windows(Merging):
    """A window of 2 × 2 patches becomes one row where its four are alike, a window of 2 × 2 such windows too, and so on: first
    those whose least alike row is nearest to their mean. A plain of sky becomes few large rows, and what is small stays as it
    is. A grid with an odd side leaves its last row and column alone.

    A quadtree (Finkel and Bentley, Acta Informatica 4, 1974), as region merging in images has it (Horowitz and Pavlidis, J. ACM
    23, 1976).
    """

    def reachable(self, tiles: int, side: int, left: int) -> int:
        patches, least = tiles * side**2, tiles * _least(side)
        # Rounding, and class tokens, which are not in ``left``, may ask for up to two rows a tile less.
        if left < least - 2 * tiles:
            raise ValueError(f"keep={self.keep:g}: windows leave a tile of {side} × {side} patches {_least(side)} rows or more")
        # Three rows go with each window.
        return max(least, patches - (patches - left) // 3 * 3)

    def groups(self, rows: TowerRows, left: int) -> Tensor:
        side = math.isqrt(rows.tokens - 1)
        # Patches alone are numbered here, without class tokens.
        first = rows.places - 1 - rows.places // rows.tokens
        blocks = _Blocks(rows, first, rows.tiles, side)
        to_go = torch.full_like(first[:, 0], (first.shape[1] - left) // 3)
        # A round that does not suffice has merged every window there was, and so made the next larger ones.
        for _ in range(side.bit_length()):
            to_go = to_go - blocks.merge(to_go)
        return blocks.number(first)


def _least(side: int) -> int:
    """Rows that a tile's patches are left with once all has merged that may."""
    least = 0
    while side:
        least += side**2 - 4 * (side // 2) ** 2
        side //= 2
    return least


class _Blocks:
    """Square blocks of patches, each known by its first one. P = tiles × side² patches."""

    def __init__(self, rows: TowerRows, first: Tensor, tiles: int, side: int) -> None:
        batch, _, width = rows.states.shape
        patches = tiles * side * side
        self.tiles, self.side = tiles, side
        self.extent = first.new_zeros(batch, patches).scatter_(1, first, rows.sizes.sqrt().round().long())
        """(B, P) long: the side of the block that begins here, 0 for none."""
        self.sums = rows.states.new_zeros(batch, patches, width, dtype=torch.float32)
        """(B, P, width) float32: of the states of its patches."""
        self.sums.scatter_(1, first[..., None].expand(-1, -1, width), rows.states.float() * rows.sizes[..., None])
        self.block = torch.arange(patches, device=first.device).repeat(batch, 1)
        """(B, P) long: which block a block is in by now."""

    def merge(self, most: Tensor) -> Tensor:
        """Merges the windows that are most alike, up to ``most`` (B,) of each image; (B,) how many."""
        found = [self._windows(size) for size in self._sizes()]
        alike, corners, means = (torch.cat(each, 1) for each in zip(*found, strict=True))
        order = alike.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        sample, window = ((rank < most[:, None]) & (alike > -torch.inf)).nonzero(as_tuple=True)
        chosen = corners[sample, window]
        target = torch.arange(self.block.shape[1], device=order.device).repeat(len(alike), 1)
        target[sample[:, None], chosen] = chosen[:, :1]
        self.block = target.gather(1, self.block)
        self.extent[sample, chosen[:, 0]] *= 2
        self.extent[sample[:, None], chosen[:, 1:]] = 0
        self.sums[sample, chosen[:, 0]] = means[sample, window]
        return torch.bincount(sample, minlength=len(alike))

    def number(self, first: Tensor) -> Tensor:
        """(B, f) long: the number of the block that each of the blocks that began at ``first`` (B, f) is in."""
        return ((self.extent > 0).cumsum(1) - 1).gather(1, self.block.gather(1, first))

    def _sizes(self) -> list[int]:
        """Sides of blocks of which four make a window."""
        return [2**level for level in range(self.side.bit_length()) if 2 ** (level + 1) <= self.side]

    def _windows(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows of 2 × 2 blocks of side ``size``: (B, windows) their least cosine to their mean, −∞ where not all four are
        there; (B, windows, 4) where these begin; (B, windows, width) the sums of their states."""
        count = self.side // (2 * size)
        corner = torch.arange(0, 2 * count * size, 2 * size, device=self.block.device)
        tile = torch.arange(self.tiles, device=corner.device) * self.side**2
        begins = (tile[:, None, None] + corner[:, None] * self.side + corner).flatten()
        inner = torch.tensor([0, size, size * self.side, size * self.side + size], device=corner.device)
        corners = (begins[:, None] + inner).expand(len(self.block), -1, -1)
        there = (self.extent[:, corners[0]] == size).all(-1)
        four = self.sums[:, corners[0]]
        whole = four.sum(2)
        alike = F.cosine_similarity(four, whole[:, :, None], dim=-1).amin(-1)
        # States that overflowed are alike to nothing, and their rows merge last.
        return alike.nan_to_num(-1).masked_fill(~there, -torch.inf), corners, whole
