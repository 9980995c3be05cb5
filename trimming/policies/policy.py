"""The shape all policies share: where it looks, how it scores, how much it keeps, how it picks, what it does with the rest.

``select`` puts the first four together; what is not kept is dropped, or merged into what is (``merge``), and of the keys that
are kept some channels may go too (``channels``). Before all of it alike features of an image may be merged (``clustering``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimming.clustering import Clustering
from trimming.selection import at_least_one_per_image, ratio_budget, top_k

Where = Literal["features", "first_layer", "each_layer"]
Look = Literal["features", "recent", "class_attention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualContext:
    """What a policy may look at. N = images × tiles × tokens positions."""

    valid: Tensor
    """(B, N) bool: features of real tiles that some text row sees; of a cluster (``Policy.clustering``) the place of the
    first member, which stands for all of it."""
    images: int
    tiles: int
    """Tiles an image, padding tiles counted in."""
    tokens: int
    """Visual tokens a tile: the class token, then its patches row by row."""
    sample_ids: tuple[str, ...]
    """One a sample: what a sample's own randomness is seeded with."""
    kv_heads: int = 1
    """Heads of keys and values, which the H query heads share in groups of H / kv_heads, one after the other."""
    attention: Tensor | None = None
    """(B, H, N) float32: a cross-attention layer's probabilities, summed over the text rows that see the image. Of the first
    layer, or for ``each_layer`` of the layer that decides. None for policies that decide before the language model runs."""
    recent: Tensor | None = None
    """(B, H, N) float32: the same, summed over the last ``recent_rows`` rows of the prompt alone."""
    features: Tensor | None = None
    """(B, N, width): the projected features, anything where not valid."""
    class_attention: Tensor | None = None
    """(B, N) float32: how much the class tokens of an image's tiles look at each token in the vision tower's last layer but
    one, mean over heads and class tokens."""


class Policy(ABC):
    """Decides which visual features stay. Subclasses are frozen dataclasses of their settings."""

    where: ClassVar[Where]
    """``features``: before the language model, for all cross-attention layers. ``first_layer``: after the first
    cross-attention layer, which has attended to every feature, for the layers behind it and for every layer's decoding.
    ``each_layer``: after each cross-attention layer's prefill, which attends to every feature, for its own decoding."""
    looks_at: ClassVar[frozenset[Look]] = frozenset()
    """What of the context it wants beside the attention that ``where`` gives; the rest is None."""
    recent_rows: ClassVar[int] = 1
    """Text rows that ``recent`` sums over, from the prompt's end."""
    merges: ClassVar[bool] = False
    """Whether ``merge`` says where dropped features go."""
    weighs: ClassVar[bool] = False
    """Whether what stands for s features counts s times in every attention to it: log s is added to its logits, as in ToMe's
    proportional attention (arXiv 2210.09461, section 3). Attention to means is then what attention to all members would be,
    had each of them their mean for a feature."""
    clustering: ClassVar[Clustering | None] = None
    """How features of an image are merged as soon as it is encoded, before ``select`` is asked; None: they are not."""
    slices: ClassVar[bool] = False
    """Whether ``channels`` leaves some out."""

    @abstractmethod
    def score(self, context: VisualContext) -> Tensor:
        """(B, H, N) float32, higher is better; H is 1 where heads do not matter."""

    @abstractmethod
    def budget(self, context: VisualContext) -> Tensor:
        """(B,) long: how many features each row of scores may keep."""

    @abstractmethod
    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        """(B, N) bool from (B, H, N) scores and a (B,) budget; (B, kv_heads, N), the same number in each head, where every head
        of keys keeps a set of its own."""

    def select(self, context: VisualContext) -> Tensor:
        """(B, N) bool, or (B, kv_heads, N): what stays. Only valid features do, and every image keeps one at least."""
        scores = self.score(context)
        picked = self.pick(scores, self.budget(context), context)
        if picked.dim() == 3:
            return picked & context.valid[:, None]
        return at_least_one_per_image(picked & context.valid, scores.sum(1), context.valid, context.images)

    def merge(self, kept: Tensor, context: VisualContext) -> Tensor:
        """(B, N) long: the kept position that each dropped one is averaged into, -1 for those that go.

        ``kept`` (B, N) bool is what ``select`` returned. Only asked where ``merges``.
        """
        raise NotImplementedError(f"{type(self).__name__} merges nothing")

    def key_width(self, head_dim: int) -> int:
        """Channels of a head's keys that decoding is left with."""
        return head_dim

    def channels(self, query: Tensor, key: Tensor) -> Tensor:
        """(KV, key_width) long, ascending: which channels of each head's keys those are. Only asked where ``slices``.

        Args:
            query: (KV, H / KV × rows, D) of one sample's text rows that see the image.
            key: (KV, n, D) that were kept.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves out no channels")


@dataclass(frozen=True)
class KeepShare(Policy):
    """A policy that keeps a share of each sample's valid features, to the nearest, at least one."""

    keep: float
    """Share of the valid features, in (0, 1]."""

    def __post_init__(self) -> None:
        check_ratio("keep", self.keep)

    def budget(self, context: VisualContext) -> Tensor:
        return ratio_budget(self.keep, context.valid)

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        return top_k(scores, budget, context.valid)[:, 0]


def check_ratio(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is not a share of the features: give a number above 0 and at most 1")


def given(looked_at: Tensor | None, name: str) -> Tensor:
    """What the context has of this name. Raises ``ValueError`` where whoever asks has not filled it in."""
    if looked_at is None:
        raise ValueError(f"the policy needs {name} in its context")
    return looked_at


def no_scores(context: VisualContext) -> Tensor:
    """(B, 1, N) of zeros, for policies that do not look."""
    return torch.zeros(context.valid.shape, dtype=torch.float32, device=context.valid.device)[:, None]
