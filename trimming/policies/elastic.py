"""Elastic Cache (arXiv 2407.18121, section 3.2): the most attended features stay, and the others are merged into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimming.policies.policy import KeepShare, VisualContext, Where, given


@dataclass(frozen=True)
class ElasticCache(KeepShare):
    """Each layer keeps the features with the most attention, summed over heads and over the text rows that see the image, and
    averages every other one into the nearest that stays, along the order of patches, within its image.

    As the paper has it; its published code compares ``argsort`` with a count, which ranks nothing. The paper averages keys and
    values; here projected features are averaged, as a mean of normed keys would be shorter than any of them. Of two that are as
    near the earlier one takes it, as in the code. The first tokens and the last one, which the code always keeps, are a text's,
    and so is what the paper does while the answer grows: the features of an image are all there from the start.
    """

    where: ClassVar[Where] = "each_layer"
    merges: ClassVar[bool] = True

    weighted: bool = False
    """Whether a feature counts as often as it has members (``weighs``), which the paper's does not."""

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        return self.weighted

    def score(self, context: VisualContext) -> Tensor:
        return given(context.attention, "a layer's attention").sum(1, keepdim=True)

    def merge(self, kept: Tensor, context: VisualContext) -> Tensor:
        length = kept.shape[1]
        places = torch.arange(length, device=kept.device).expand_as(kept)
        size = length // context.images
        # The last kept place up to each, and the first from each on; of another image they don't count.
        before = places.masked_fill(~kept, -1).cummax(-1).values
        after = places.masked_fill(~kept, length).flip(-1).cummin(-1).values.flip(-1)
        here = places // size
        far = 2 * length
        to_left = torch.where((before >= 0) & (before // size == here), places - before, far)
        to_right = torch.where((after < length) & (after // size == here), after - places, far)
        nearest = torch.where(to_left <= to_right, before, after)
        merges = context.valid & ~kept & (torch.minimum(to_left, to_right) < far)
        return torch.where(merges, nearest, -1)
