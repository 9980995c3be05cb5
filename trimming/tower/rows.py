"""An image's rows on their way through the tower: which there are, how many patches each stands for, and who went into whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimming.merging import first_members, follow, means_by, sums_by
from trimming.tower.padding import Padding
from trimming.tower.policy import TowerPolicy, TowerRows


@dataclass(slots=True)
class Mark:
    """States of some layer, which later ones are to be joined with."""

    states: Tensor
    """(B, n + kept padding, width): real tiles' rows first."""
    sizes: Tensor | None
    """(B, n) float32: how many patches each stood for then; None for one each."""
    into: Tensor | None = None
    """(B, n) long: the row that each has gone into since, −1 for none; None where all are still there."""

    def of(self, count: int) -> Tensor:
        """The states of ``count`` rows that are there now: means over the rows that went into each, by size."""
        if self.into is None:
            return self.states
        sizes = torch.ones_like(self.into, dtype=torch.float32) if self.sizes is None else self.sizes
        return means_by(self.states, sizes, self.into, count)


class Rows:
    """B images of one tile count: rows of real tiles first, then the padding's.

    Args:
        embedded: (B, tiles, tokens, width) before the first layer.
        real: how many tiles are real.
        padding: what there is behind them.
        weighs: whether rows that stand for several count as often.
    """

    def __init__(self, embedded: Tensor, real: int, padding: Padding, weighs: bool) -> None:
        _, tiles, self.tokens, _ = embedded.shape
        self.tiles, self.weighs, self.padding = real, weighs, padding
        self.real = real * self.tokens
        """Rows of real tiles that there are."""
        self.group: Tensor | None = None
        """(B, real tiles × tokens) long: the row that stands for each, −1 for none; None where each does for itself."""
        self.sizes: Tensor | None = None
        """(B, real) float32: how many patches each stands for; None for one each."""
        self.marks: list[Mark] = []
        states = embedded.flatten(1, 2)
        # All that the layers need of it, once.
        self._padding_tile, self._padding_bias = (t.to(states.device) for t in (padding.tile, padding.sizes.log()))
        # Each tile's rows up to a multiple of eight tokens: zeros, behind everything else.
        padded = F.pad(states[:, self.real :], (0, 0, 0, tiles * (-self.tokens % 8)))
        if not padding.alone:
            group = padding.group.to(states.device).expand(len(states), -1)
            padded = means_by(padded, torch.ones_like(group, dtype=torch.float32), group, len(padding.sizes))
        self.states = torch.cat([states[:, : self.real], padded], 1)
        """(B, real + padding, width)."""
        self.bias: Tensor | None = None
        """(B or 1, real + padding) float32: what is added to the logits of each."""
        self._weigh()

    @property
    def places(self) -> Tensor:
        """(B, real) long: each row's first member."""
        if self.group is None:
            return torch.arange(self.real, device=self.states.device).expand(len(self.states), -1)
        return first_members(self.group, self.real)

    @property
    def class_rows(self) -> Tensor:
        """(B, tiles) long: where the tiles' class tokens are."""
        places = torch.arange(self.tiles, device=self.states.device) * self.tokens
        return places.expand(len(self.states), -1) if self.group is None else self.group[:, places]

    @property
    def counted(self) -> Tensor:
        """(B, real) float32: ``sizes``, with ones where there are none."""
        return self.states.new_ones(self.states.shape[0], self.real, dtype=torch.float32) if self.sizes is None else self.sizes

    def mark(self, padding: int) -> Mark:
        """Remembers the states as they are, of ``padding`` rows too; its rows are followed from now on."""
        self.marks.append(Mark(self.states[:, : self.real + padding], self.sizes))
        return self.marks[-1]

    def add_by_tile(self, embedding: Tensor) -> None:
        """Adds to each row what its members' tiles have in ``embedding`` (B, tiles, width), on the mean."""
        real = embedding[:, : self.tiles]
        if self.group is None:
            own = real.repeat_interleave(self.tokens, 1)
        else:
            tile = torch.eye(self.tiles, device=real.device).repeat_interleave(self.tokens, 0)
            members = sums_by(tile.expand(len(real), -1, -1), self.group, self.real)
            own = ((members / members.sum(-1, keepdim=True)) @ real.float()).to(real.dtype)
        self.states = self.states + torch.cat([own, embedding[:, self._padding_tile]], 1)

    def leave(
        self,
        policy: TowerPolicy,
        left: int,
        image_keys: Sequence[str],
        keys: Tensor | None,
        class_attention: Tensor | None,
    ) -> Tensor:
        """Has ``policy`` bring the rows of real tiles to ``left``. ``keys`` and ``class_attention`` are of the layer just
        done, over all rows of real tiles.

        Returns (B, n) long: the row that each of the n that there were has gone into, −1 for none.
        """
        batch, device = len(self.states), self.states.device
        taken = torch.zeros(batch, self.real, dtype=torch.bool, device=device).scatter_(1, self.class_rows, True)
        # As many in every image; without waiting for the device.
        free = taken.byte().argsort(dim=1, stable=True)[:, : self.real - self.tiles]
        real, counted = self.states[:, : self.real], self.counted

        def of_free(each: Tensor | None) -> Tensor | None:
            return None if each is None else each.gather(1, free) if each.dim() == 2 else _gather(each, free)

        rows = TowerRows(
            states=_gather(real, free),
            sizes=counted.gather(1, free),
            places=self.places.gather(1, free),
            tiles=self.tiles,
            tokens=self.tokens,
            image_keys=tuple(image_keys),
            keys=of_free(keys),
            class_attention=of_free(class_attention),
        )
        groups = policy.groups(rows, left - self.tiles)
        # Class tokens' rows stay apart, in front; then all in the order of first members.
        number = free.new_empty(batch, self.real)
        number.scatter_(1, self.class_rows, torch.arange(self.tiles, device=device).expand(batch, -1))
        number.scatter_(1, free, (groups + self.tiles).masked_fill(groups < 0, -1))
        into = _in_order(number, left)
        weights = counted.scatter(1, free, policy.weights(rows))
        merged = means_by(real, weights, into, left)
        self.states = torch.cat([merged, self.states[:, self.real :]], 1)
        self.sizes = sums_by(counted[..., None], into, left)[..., 0]
        self.group = into.expand(batch, -1) if self.group is None else follow(self.group, into)
        for mark in self.marks:
            mark.into = into if mark.into is None else follow(mark.into, into)
        self.real = left
        self._weigh()
        return into

    def _weigh(self) -> None:
        parts = None
        if self.sizes is not None and self.weighs:
            parts = self.sizes.log()
        if parts is not None or not self.padding.alone:
            own = self.states.new_zeros(1, self.real, dtype=torch.float32) if parts is None else parts
            self.bias = torch.cat([own, self._padding_bias.expand(len(own), -1)], 1)


def _in_order(number: Tensor, count: int) -> Tensor:
    """(B, n) numbers below ``count`` or −1, as numbers in the order of first members."""
    rank = first_members(number, count).argsort(1).argsort(1)
    return rank.gather(1, number.clamp(min=0)).masked_fill(number < 0, -1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """(B, n, width) and (B, m) → (B, m, width)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
