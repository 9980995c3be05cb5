"""Choosing the next token: greedily, or from a stream of random numbers that belongs to the row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_FLOAT = torch.finfo(torch.float32)


def whole(number: object) -> bool:
    """Whether it is an integer, numpy's among them. True and False are none."""
    return isinstance(number, Integral) and not isinstance(number, bool)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are chosen. Filters apply in this order: temperature, top-k, top-p."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the smallest set of tokens with at least this much probability (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and not negative; 0 takes the likeliest token")
        if self.top_k is not None and not (whole(self.top_k) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 1; None keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not whole(self.seed):
            raise ValueError(f"seed={self.seed} must be a whole number; 0 is the default")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: at 0, and so close to it that float32 can't divide by it."""
        return self.temperature < _FLOAT.tiny

    def stream(self, id: str, length: int) -> Sequence[float]:
        """``length`` uniform numbers in [0, 1), one a token: decided by ``seed`` and ``id``, whatever runs beside the row."""
        digest = hashlib.sha256(f"{self.seed}\0{id}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(length).tolist()


GREEDY = Sampling()


def choose(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """The next token of each row.

    Args:
        logits: (B, V).
        samplings: one a row.
        draws: one uniform number a row; greedy rows ignore theirs.

    Returns:
        (B,) long.
    """
    best = logits.argmax(-1)
    rows = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    if rows:
        best[rows] = _sample(logits[rows].float(), [samplings[i] for i in rows], [draws[i] for i in rows])
    return best


def _sample(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """By inverting the cumulated probabilities, likeliest token first: one uniform number decides a token."""
    device, vocabulary = logits.device, logits.shape[-1]
    temperature = torch.tensor([min(s.temperature, _FLOAT.max) for s in samplings], device=device)
    most = torch.tensor([min(s.top_k or vocabulary, vocabulary) for s in samplings], device=device)
    mass = torch.tensor([s.top_p or 1.0 for s in samplings], device=device)
    ordered, tokens = logits.sort(descending=True, stable=True)
    # The likeliest's becomes 0: what overflows is far below it, and has no probability.
    ordered = (ordered - ordered[:, :1]) / temperature[:, None]
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=device) >= most[:, None], -torch.inf)
    probability = ordered.softmax(-1)
    # A token stays while the likelier ones have not reached the mass yet, so the likeliest always does.
    before = F.pad(probability.cumsum(-1)[:, :-1], (1, 0))
    probability = probability.masked_fill(before >= mass[:, None], 0.0)
    cumulated = probability.double().cumsum(-1)
    drawn = torch.tensor(draws, device=device, dtype=torch.float64)[:, None] * cumulated[:, -1:]
    # Rounding must not step behind the last token that has any probability.
    place = torch.minimum(torch.searchsorted(cumulated, drawn, right=True), (probability > 0).sum(-1, keepdim=True) - 1)
    # Logits of NaN leave no token any probability.
    return tokens.gather(-1, place.clamp(min=0))[:, 0]
