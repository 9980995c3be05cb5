"""This project's own: farthest points among what any head looks at, chosen behind the first cross-attention layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimming.policies.policy import VisualContext, given
from trimming.policies.weighted_farthest import WeightedFarthest


@dataclass(frozen=True)
class Spread(WeightedFarthest):
    """``WeightedFarthest`` with the square root of the best head's attention for a weight.

    Trimmed-Llama lets every head speak for itself, which a mean over heads does not; the root makes a feature that some head
    looks at a little worth having where nothing like it is kept yet. Both were chosen on 500 held-out demo scenes that
    nothing else here measures with (accuracy at 15 % of the features: best head 87.5, 88.5, 88.5 and 88.3 % for powers of 1,
    1/2, 1/4 and 0, mean over heads 87.3, 88.2, 88.4 and 88.3; Trimmed-Llama 83.2): most of the gain is the spread itself.
    """

    def score(self, context: VisualContext) -> Tensor:
        return given(context.attention, "the first cross-attention layer's attention").amax(1, keepdim=True).sqrt()
