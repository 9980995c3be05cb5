"""What a sample of agreements proves: a lower bound of their mean, and how large a sample has to be for a target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def lower_bound(mean: float, size: float, confidence: float) -> float:
    """What the mean of independent variables in [0, 1] exceeds with ``confidence``, given that ``size`` of them have this mean.

    The smallest p with size · KL(mean ‖ p) ≤ ln 1/(1 − confidence), KL between coins of these biases: Chernoff's bound, which
    holds for any variables in [0, 1] (Hoeffding, Probability inequalities for sums of bounded random variables, JASA 1963,
    theorem 1), for shares of exact matches and for mean similarities alike. Without any disagreement it is the exact binomial
    bound, (1 − confidence)^(1/size).
    """
    if not 0 <= mean <= 1 or size <= 0 or not 0 < confidence < 1:
        raise ValueError(f"mean={mean}, size={size} and confidence={confidence} make no bound")
    allowed = -math.log1p(-confidence) / size
    low, high = 0.0, mean
    # Bisection: the divergence falls as p comes nearer to the mean.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(mean, middle) > allowed else (low, middle)
    return low


def divergence(mean: float, p: float) -> float:
    """Kullback and Leibler's, of a coin of bias ``p`` from one of bias ``mean``, in nats."""

    def term(share: float, other: float) -> float:
        if share == 0:
            return 0.0
        return math.inf if other == 0 else share * math.log(share / other)

    return term(mean, p) + term(1 - mean, 1 - p)


def size_that_would_show(target: float, confidence: float) -> int:
    """The fewest independent rows that can show ``target``: as many as do if they agree without exception."""
    return math.ceil(math.log1p(-confidence) / math.log(target) - 1e-9)


def effective_size(counts: Sequence[int] | np.ndarray) -> float:
    """Independent rows that clusters of these sizes are worth if the rows of a cluster agree or disagree together: Kish's
    (Σ n)² / Σ n² (Survey Sampling, 1965). The cautious end: questions about one image are not quite as alike as that."""
    sizes = np.asarray(counts, np.float64)
    return float(sizes.sum() ** 2 / np.square(sizes).sum()) if len(sizes) else 0.0
