"""Choosing the next token: greedily, or from a stream of random numbers that belongs to the row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; None keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")

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
    rows = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if rows:
        best[rows] = _sample(logits[rows].float(), [samplings[i] for i in rows], [draws[i] for i in rows])
    return best


def _sample(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """By inverting the cumulated probabilities, likeliest token first: one uniform number decides a token."""
    device, vocabulary = logits.device, logits.shape[-1]
    temperature = torch.tensor([s.temperature for s in samplings], device=device)
    most = torch.tensor([s.top_k or vocabulary for s in samplings], device=device)
    mass = torch.tensor([s.top_p or 1.0 for s in samplings], device=device)
    ordered, tokens = (logits / temperature[:, None]).sort(descending=True, stable=True)
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
