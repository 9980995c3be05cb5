"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from torch import Tensor

from trimming.engine.sampling import GREEDY, Sampling, whole
from trimming.samples import SampleTrim

KeptSets = Literal["image", "question"]
"""Who decides what is kept: all questions about an image together, one set for them all, or each for itself."""

GROUP_ROWS = 64
GROUP_TOKENS = 8192
"""Requests, and their prompts' tokens, that decide together, at most: they are prefilled at once. A longer prompt is alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """One picture, cut into tiles."""

    key: str
    """What tells pictures apart, such as a digest of the file: images of one key are encoded once."""
    pixels: Tensor
    """(tiles, 3, side, side) uint8, real tiles only."""
    ratio_id: int
    """The model's number for the tiles' arrangement, from 1."""

    def __post_init__(self) -> None:
        if not issubclass(kind := type(self.pixels), Tensor):
            raise ValueError(f"image {self.key!r} has pixels of type {kind.__name__}; give a tensor (tiles, 3, side, side)")
        if not whole(self.ratio_id):
            raise ValueError(f"image {self.key!r} has ratio_id={self.ratio_id!r}, which is no int; give int(ratio_id)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One prompt to be continued."""

    id: str
    """Seeds the row's own randomness, in sampling and in policies that draw."""
    tokens: Sequence[int]
    """The prompt, one image token for each image."""
    images: Sequence[Image] = ()
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    """Texts that end the answer and are cut off it."""

    def __post_init__(self) -> None:
        for name, (kind, remedy) in _LISTS.items():
            given = getattr(self, name)
            # A text is a sequence too, of texts.
            if isinstance(given, str | bytes) or not isinstance(given, Sequence):
                raise ValueError(f"request {self.id!r} has {name} of type {type(given).__name__}; {remedy}")
            for other in set(map(type, given)):
                if not issubclass(other, kind) or other is bool:
                    raise ValueError(f"request {self.id!r} has {name} with members of type {other.__name__}; {remedy}")
        if not self.tokens:
            raise ValueError(f"request {self.id!r} has no tokens; give at least one")
        if not whole(self.max_new_tokens) or self.max_new_tokens < 1:
            given = f"max_new_tokens={self.max_new_tokens!r}"
            raise ValueError(f"request {self.id!r} has {given}; give a whole number of at least 1")
        if not all(self.stop):
            raise ValueError(f"request {self.id!r} has an empty text in stop, which would end every answer; leave it out")


_LISTS = {
    "tokens": (Integral, "give a list of ints, such as tokens.tolist() of one prompt"),
    "images": (Image, "give a list of Image, of a single one too: images=[image]"),
    "stop": (str, 'give a list of texts, of a single one too: stop=["..."]'),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """What became of a request."""

    tokens: list[int]
    """The tokens it said, a stop string's among them but not an end token. More behind the stop string only where that holds
    many tokens without text."""
    text: str | None
    """The tokens as text up to a stop string; None for an engine without a detokenizer."""
    finish_reason: str
    """``stop``: an end token or a stop string; ``length``: ``max_new_tokens``."""
    output_tokens: int
    """Tokens generated, the end token among them."""
    trim: SampleTrim


def groups(images: Sequence[Sequence[Hashable]], tokens: Sequence[int]) -> list[list[int]]:
    """Which requests decide together: places of those with the same images, groups in the order of their first ones.

    A group over ``GROUP_ROWS`` or ``GROUP_TOKENS`` is cut by these numbers alone, into parts as even as its order allows, so
    that nothing but the requests tells who decides with whom. One without images is alone.

    Args:
        images: the images' keys of each request.
        tokens: the length of each prompt.
    """
    together: dict[Hashable, list[int]] = defaultdict(list)
    for place, keys in enumerate(images):
        together[tuple(keys) if keys else place].append(place)
    return [part for places in together.values() for part in _cut(places, tokens)]


def _cut(places: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
    total = sum(tokens[place] for place in places)
    count = max(-(-len(places) // GROUP_ROWS), -(-total // GROUP_TOKENS))
    most_rows, most_tokens = -(-len(places) // count), -(-total // count)
    parts: list[list[int]] = []
    filled = 0
    for place in places:
        # Even parts end a little over their share of the tokens, never over the limit.
        rows_full = bool(parts) and len(parts[-1]) >= most_rows
        over = filled + tokens[place] > GROUP_TOKENS
        if not parts or rows_full or over or filled >= most_tokens:
            parts.append([])
            filled = 0
        parts[-1].append(place)
        filled += tokens[place]
    return parts
