"""VisionZip (arXiv 2412.04467, section 3.2): what the vision tower itself looks at, and a digest of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, Look, VisualContext, Where, given
from trimming.selection import top_k, unit_rows

CONTEXTUAL = 10 / 64
"""Of what stays, the share of contextual tokens: the paper's 54 dominant and 10 contextual of 64."""


@dataclass(frozen=True)
class VisionZip(KeepShare):
    """Dominant features are those with the most attention of the class tokens in the tower's last layer but one. Of the others
    evenly spaced ones stay as contextual features, and all that is left is averaged into the contextual feature of its image
    that it is most alike.

    The paper compares the tower's keys; here projected features are compared, by their cosine. Its code adds the mean of what
    is merged to the contextual feature, which doubles its length; here all of them have one mean. Its code keeps the class
    token whatever its score; here class tokens are ranked like others, and a tower with several tiles has as many of them,
    whose attention is averaged.
    """

    where: ClassVar[Where] = "features"
    looks_at: ClassVar[frozenset[Look]] = frozenset({"class_attention", "features"})
    merges: ClassVar[bool] = True

    weighted: bool = False
    """Whether a contextual feature counts as often as it has members (``weighs``), which the paper's does not."""

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        return self.weighted

    def score(self, context: VisualContext) -> Tensor:
        return given(context.class_attention, "the class tokens' attention")[:, None]

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        kept = self._dominant(scores, budget, context)
        for row, whole in enumerate(budget.tolist()):
            rest = (context.valid[row] & ~kept[row]).nonzero()[:, 0]
            count = min(whole - int(kept[row].sum()), len(rest))
            if count:
                kept[row, rest[torch.arange(count, device=rest.device) * len(rest) // count]] = True
        return kept

    def _dominant(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        """(B, N) bool."""
        contextual = (budget * CONTEXTUAL).round().long()
        return top_k(scores, budget - contextual, context.valid)[:, 0]

    def merge(self, kept: Tensor, context: VisualContext) -> Tensor:
        dominant = self._dominant(self.score(context), self.budget(context), context)
        targets = torch.full(kept.shape, -1, device=kept.device)
        image = torch.arange(kept.shape[1], device=kept.device) // (kept.shape[1] // context.images)
        for row, features in enumerate(given(context.features, "features")):
            into = (kept[row] & ~dominant[row]).nonzero()[:, 0]
            goes = (context.valid[row] & ~kept[row]).nonzero()[:, 0]
            if len(into) and len(goes):
                alike = unit_rows(features[goes]) @ unit_rows(features[into]).T
                alike = alike.masked_fill(image[goes][:, None] != image[into], -torch.inf)
                best, place = alike.max(-1)
                targets[row, goes] = torch.where(best > -torch.inf, into[place], -1)
        return targets
