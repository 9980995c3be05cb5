"""The models' geometries, and which share of the visual tokens a K keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import MllamaConfig

_VISION = {"image_size": 560}
# Of Llama-3.2-90B-Vision's config.json what differs from the 11B's, which transformers has for its defaults.
_TEXT_90B = {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 100,
    "num_attention_heads": 64,
    "cross_attention_layers": list(range(3, 100, 5)),
}
KNOWN = ("11b", "90b")
"""Llama-3.2-Vision's sizes, which need no config.json."""

PUBLISHED: dict[str, Mapping[float, float]] = {"11b": {0.05: 0.142, 0.25: 0.615}, "90b": {0.15: 0.510, 0.25: 0.742}}
"""Kept fraction by K: Trimmed-Llama, arXiv 2504.00557, on SEED-Bench."""


def config_of(model: str, revision: str | None = None) -> MllamaConfig:
    """The model's configuration: a known size, or the config.json of a folder or of the Hub. Raises ``ValueError``."""
    from transformers import MllamaConfig

    if model.lower() in KNOWN:
        return MllamaConfig(vision_config=_VISION, text_config=_TEXT_90B if model.lower() == "90b" else {})
    from pipeline.model import find_checkpoint

    found: dict[str, Any] = dict(find_checkpoint(model, revision).config)
    found.pop("model_type", None)
    return MllamaConfig(**found)


def size_of(config: MllamaConfig) -> str | None:
    """``11b`` or ``90b`` for a model with that language model's layers and widths; None for any other."""
    text = config.text_config
    sizes = {(4096, 40, 32): "11b", (8192, 100, 64): "90b"}
    return sizes.get((text.hidden_size, text.num_hidden_layers, text.num_attention_heads))


def keep_fraction(k_ratio: float, points: Mapping[float, float]) -> float:
    """The kept fraction at ``k_ratio`` by a curve through ``points`` (K to kept fraction), through 0 at 0 and 1 at 1.

    Were the heads' picks independent of each other, h heads would keep 1 − (1 − K)^h. What is measured is that with the h of
    heads that agree much: 3.0 at K = 0.05 and 3.3 at 0.25 for the 11B's 32 heads. Each point has such an h; between points h
    goes in a straight line, and beyond them it stays. Raises ``ValueError`` for a K outside of (0, 1], and without points.
    """
    if not 0 < k_ratio <= 1:
        raise ValueError(f"k_ratio={k_ratio} must lie in (0, 1]")
    if k_ratio == 1:
        return 1.0
    known = [(k, heads(k, kept)) for k, kept in sorted(points.items()) if 0 < k < 1 and k <= kept < 1]
    if not known:
        raise ValueError(f"k_ratio={k_ratio} has no measured kept fraction to go by for this model; state --keep")
    return 1 - (1 - k_ratio) ** _between(k_ratio, known)


def heads(k_ratio: float, kept: float) -> float:
    """How many independent heads would keep ``kept`` at ``k_ratio``."""
    return math.log(1 - kept) / math.log(1 - k_ratio)


def _between(x: float, points: list[tuple[float, float]]) -> float:
    for (a, here), (b, there) in pairwise(points):
        if a <= x <= b:
            return here + (there - here) * (x - a) / (b - a)
    return points[0][1] if x < points[0][0] else points[-1][1]
