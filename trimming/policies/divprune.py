"""DivPrune (arXiv 2503.02175, section 3): the features that are least alike, whatever is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, Look, VisualContext, Where, given, no_scores
from trimming.selection import farthest_points, nearest_distances, unit_rows


@dataclass(frozen=True)
class DivPrune(KeepShare):
    """Solves max–min diversity greedily (algorithm 1): first the feature that is farthest from its nearest neighbour, then
    always the one that is farthest from those chosen, by cosine distance.

    Projected features are compared, of all the sample's images together, class tokens among them; the paper has one image and
    no class token. The choice depends on the images alone, so that all questions about them share what is kept.
    """

    where: ClassVar[Where] = "features"
    looks_at: ClassVar[frozenset[Look]] = frozenset({"features"})

    def score(self, context: VisualContext) -> Tensor:
        return no_scores(context)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        chosen = torch.zeros_like(context.valid)
        for row, features in enumerate(given(context.features, "features")):
            places = context.valid[row].nonzero()[:, 0]
            if len(places):
                unit = unit_rows(features[places])
                first = int(nearest_distances(unit).argmax())
                chosen[row, places[farthest_points(unit, int(budget[row]), first)]] = True
        return chosen
