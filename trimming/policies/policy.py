"""The shape all policies share: where it looks, how it scores, how much it keeps, how it picks.

What is done with the rest is always the same so far: it is dropped, and the kept rows are gathered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimming.selection import at_least_one_per_image

Where = Literal["features", "first_layer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualContext:
    """What a policy may look at. N = images × tiles × tokens positions."""

    valid: Tensor
    """(B, N) bool: features of real tiles that some text row sees."""
    images: int
    tiles: int
    """Tiles an image, padding tiles counted in."""
    tokens: int
    """Visual tokens a tile: the class token, then its patches row by row."""
    sample_ids: tuple[str, ...]
    """One a sample: what a sample's own randomness is seeded with."""
    attention: Tensor | None = None
    """(B, H, N) float32: the first cross-attention layer's probabilities, summed over the text rows that see the image.
    None for policies that decide before the language model runs."""


class Policy(ABC):
    """Decides which visual features stay. Subclasses are frozen dataclasses of their settings."""

    where: ClassVar[Where]
    """``features``: before the language model, for all cross-attention layers. ``first_layer``: after the first
    cross-attention layer, which has attended to every feature, for the layers behind it and for every layer's decoding."""

    @abstractmethod
    def score(self, context: VisualContext) -> Tensor:
        """(B, H, N) float32, higher is better; H is 1 where heads do not matter."""

    @abstractmethod
    def budget(self, context: VisualContext) -> Tensor:
        """(B,) long: how many features each row of scores may keep."""

    @abstractmethod
    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        """(B, N) bool from (B, H, N) scores and a (B,) budget."""

    def select(self, context: VisualContext) -> Tensor:
        """(B, N) bool: what stays. Only valid features do, and every image that has any keeps at least one."""
        scores = self.score(context)
        kept = self.pick(scores, self.budget(context), context) & context.valid
        return at_least_one_per_image(kept, scores.sum(1), context.valid, context.images)


def check_ratio(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is not a share of the features: give a number above 0 and at most 1")


def no_scores(context: VisualContext) -> Tensor:
    """(B, 1, N) of zeros, for policies that do not look."""
    return torch.zeros(context.valid.shape, dtype=torch.float32, device=context.valid.device)[:, None]
