"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimming.engine.sampling import GREEDY, Sampling
from trimming.samples import SampleTrim


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """One picture, cut into tiles."""

    key: str
    """What tells pictures apart, such as a digest of the file: images of one key are encoded once."""
    pixels: Tensor
    """(tiles, 3, side, side) uint8, real tiles only."""
    ratio_id: int
    """The model's number for the tiles' arrangement, from 1."""


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
