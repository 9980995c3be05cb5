"""The shape that all tower policies share: which of an image's rows go on through the vision tower, layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from torch import Tensor

Look = Literal["keys", "class_attention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerRows:
    """What a tower policy may look at behind a layer: of each of B images of one tile count the f rows that may go. Class
    tokens are not among them; their rows go on alone."""

    states: Tensor
    """(B, f, width)."""
    sizes: Tensor
    """(B, f) float32: how many patches each row stands for."""
    places: Tensor
    """(B, f) long, ascending: each row's first member, on the axis of real tiles × tokens."""
    tiles: int
    """Real tiles of each image."""
    tokens: int
    """Visual tokens a tile: the class token, then its patches row by row."""
    image_keys: tuple[str, ...]
    """What a policy that draws is seeded with."""
    keys: Tensor | None = None
    """(B, f, head width) float32: the rows' keys in the layer's attention, mean over heads."""
    class_attention: Tensor | None = None
    """(B, f) float32: the attention that the rows have from the class tokens in the layer, mean over heads and class tokens."""


@dataclass(frozen=True)
class TowerPolicy(ABC):
    """Lets an image's rows merge or leave behind each of the tower's local layers, a little every time: the same share of what
    is there, so that half of the rows are never gone at once. Only what is left goes through the layers behind it, is projected
    and can be attended to by text.

    The number of rows follows from the tile count alone, and which ones go from the image alone.
    """

    keep: float
    """Share of rows × layers that the tower is left with, above 0, about its share of the work; 1 leaves the tower alone."""

    looks_at: ClassVar[frozenset[Look]] = frozenset()
    """What of ``TowerRows`` it wants; the rest is None."""
    weighs: ClassVar[bool] = False
    """Whether a row that stands for s patches counts s times in every attention to it, in the tower and in the language model:
    log s is added to its logits (ToMe, arXiv 2210.09461, section 3)."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} is not a share of the tower: give a number above 0 and at most 1")

    @abstractmethod
    def groups(self, rows: TowerRows, left: int) -> Tensor:
        """(B, f) long: which of ``left`` rows to come each row goes into, numbered as it likes; −1 for a row that leaves."""

    def weights(self, rows: TowerRows) -> Tensor:
        """(B, f) float32: what each row counts in the mean of those that it merges with."""
        return rows.sizes

    def operations(self, count: int, left: int, width: int, head_width: int) -> int:
        """Floating-point operations of the matrix products that bring ``count`` rows, class tokens apart, to ``left``."""
        return 0

    def reachable(self, tiles: int, side: int, left: int) -> int:
        """The number of rows without class tokens, ``left`` or a little more, that an image of ``tiles`` tiles of side² patches
        can be brought to. Raises ``ValueError`` where that is more than a rounding away."""
        return left

    def plan(self, tiles: int, tokens: int, layers: int, global_layers: int) -> list[int]:
        """Rows of an image's real tiles that enter each of the tower's layers, and that are left behind the last one.

        Raises ``ValueError`` where ``keep`` can't be reached: the first layer sees all rows.
        """
        whole = tiles * tokens
        share = layer_share(self.keep, layers, global_layers)
        rows = [whole]
        for layer in range(1, layers + 1):
            wanted = max(1, round(whole * share**layer) - tiles)
            side = round((tokens - 1) ** 0.5)
            rows.append(min(rows[-1], tiles + self.reachable(tiles, side, wanted)))
        return rows + [rows[-1]] * global_layers


@dataclass(frozen=True)
class Merging(TowerPolicy):
    """A policy that merges rows."""

    weighted: bool = True
    """Whether a merged row counts as often as it has members, as ToMe's do: its proportional attention."""

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        return self.weighted


@cache
def layer_share(keep: float, layers: int, global_layers: int) -> float:
    """The share of its rows that each of the local ``layers`` hands on, for ``keep`` × all layers of rows in sum."""
    total = keep * (layers + global_layers)

    def taken(share: float) -> float:
        return sum(share**layer for layer in range(layers)) + global_layers * share**layers

    low, high = 0.0, 1.0
    if total <= taken(low):
        least = 1 / (layers + global_layers)
        raise ValueError(f"keep={keep:g} of the tower: its first layer alone, which sees every row, is {least:.3g} of it")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) < total else (low, middle)
    return high
