"""The K at which Trimmed-Llama keeps half of the features, with one kept set an image or one a question."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.ours import Ours
from benchmarks.workloads import Workload
from trimming import TrimmedLlama, VisualContext
from trimming.engine import KeptSets
from trimming.engine.images import ImageCache

HALF = 0.5


@dataclass(frozen=True, slots=True)
class Half:
    """The K, and the fraction that it was found to keep, mean over kept sets."""

    k_ratio: float
    keep_fraction: float

    @property
    def policy(self) -> TrimmedLlama:
        return TrimmedLlama(k_ratio=self.k_ratio)


def find_half(ours: Ours, load: Workload, kept_sets: KeptSets = "image", images: ImageCache | None = None) -> Half:
    """By bisection on the attention of one prefill of ``load``; the model does not run again. ``images`` are encoded ones."""
    policy = _Listener()
    engine = ours.engine(policy, images, kept_sets)
    engine.generate(ours.requests(load.cut(1), range(len(load.rows)), {}))
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if policy.kept(middle) < HALF else (low, middle)
    k_ratio = round(high, 4)
    return Half(k_ratio, policy.kept(k_ratio))


@dataclass(frozen=True)
class _Listener(TrimmedLlama):
    """Remembers what it is shown, to tell what other ratios would have kept."""

    seen: list[VisualContext] = field(default_factory=list, compare=False)

    def score(self, context: VisualContext) -> Tensor:
        self.seen.append(context)
        return super().score(context)

    def kept(self, k_ratio: float) -> float:
        """Mean over kept sets of the kept fraction."""
        policy = TrimmedLlama(k_ratio=k_ratio)
        return float(torch.cat([policy.select(c).sum(-1) / c.valid.sum(-1) for c in self.seen]).mean())
