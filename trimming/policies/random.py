"""A control: features drawn at random. A policy that does not beat it at the same kept share is not worth its cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, VisualContext, Where


@dataclass(frozen=True)
class Random(KeepShare):
    """Keeps a uniformly drawn share of the valid features.

    The draw is seeded by ``seed`` and the sample's id: it depends neither on the sample's neighbours nor on a restart.
    """

    seed: int = 0
    where: ClassVar[Where] = "features"

    def score(self, context: VisualContext) -> Tensor:
        scores = torch.zeros(context.valid.shape, dtype=torch.float32)
        valid = context.valid.cpu()
        for row, sample_id in enumerate(context.sample_ids):
            generator = generator_of(self.seed, sample_id)
            # As many ranks as the sample has features: the batch's padding must not shift the draw.
            ranks = torch.randperm(int(valid[row].sum()), generator=generator)
            scores[row, valid[row]] = ranks.float()
        return scores.to(context.valid.device)[:, None]


def generator_of(seed: int, id: str) -> torch.Generator:
    """One that draws the same for the same ``seed`` and ``id``, on any machine."""
    digest = hashlib.sha256(f"{seed}/{id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
