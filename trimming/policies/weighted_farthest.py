"""Farthest points weighted by attention: diversity among what the text looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, Look, VisualContext, Where, given
from trimming.selection import farthest_points, unit_rows


@dataclass(frozen=True)
class WeightedFarthest(KeepShare):
    """DivPrune's greedy choice (arXiv 2503.02175, algorithm 1) after the first cross-attention layer, each cosine distance
    weighted by the attention that the feature got there, mean over heads: the first is the most attended one.

    A cross of two, and no paper's: attention alone keeps many features that say the same, diversity alone keeps what nobody
    asked about.
    """

    where: ClassVar[Where] = "first_layer"
    looks_at: ClassVar[frozenset[Look]] = frozenset({"features"})

    def score(self, context: VisualContext) -> Tensor:
        return given(context.attention, "the first cross-attention layer's attention").mean(1, keepdim=True)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        chosen = torch.zeros_like(context.valid)
        for row, features in enumerate(given(context.features, "features")):
            places = context.valid[row].nonzero()[:, 0]
            if len(places):
                weights = scores[row, 0, places]
                picked = farthest_points(unit_rows(features[places]), int(budget[row]), int(weights.argmax()), weights)
                chosen[row, places[picked]] = True
        return chosen
