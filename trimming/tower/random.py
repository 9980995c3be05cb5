"""A control: rows drawn at random leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimming.policies.random import generator_of
from trimming.tower.policy import TowerPolicy, TowerRows


@dataclass(frozen=True)
class RandomRows(TowerPolicy):
    """Rows leave in an order that is drawn for each image, seeded by ``seed`` and what tells the image from others."""

    seed: int = 0

    def groups(self, rows: TowerRows, left: int) -> Tensor:
        drawn = [torch.randperm(rows.tiles * rows.tokens, generator=generator_of(self.seed, key)) for key in rows.image_keys]
        return first_ranked(torch.stack(drawn).to(rows.places.device).gather(1, rows.places), left)


def first_ranked(worth: Tensor, left: int) -> Tensor:
    """(B, f) long: each of the ``left`` rows of the least ``worth`` (B, f), all different in a row, alone; −1 for the rest."""
    rank = worth.argsort(1).argsort(1)
    return rank.masked_fill(rank >= left, -1)
