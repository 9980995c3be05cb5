"""A request on its way through the engine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimming.engine.memory import Segment
from trimming.engine.request import Completion, Image, Request
from trimming.samples import SampleTrim


@dataclass(slots=True, eq=False)
class Encoded:
    """An image after tower and projector; nothing here depends on a text."""

    tiles: int
    features: Tensor
    """(tokens, text width): the real tiles' features, then padding tiles' where the engine keeps them; or what the real ones'
    were merged into."""
    class_attention: Tensor | None = None
    """Of the real tiles' features, or of what they were merged into, float32; see ``VisualContext.class_attention``. None where
    no policy looks at it."""
    members: Members | None = None
    """What was merged into ``features``; None where each stayed alone."""

    def real(self, tokens: int) -> int:
        """How many of ``features`` are of real tiles, which have ``tokens`` each."""
        return self.tiles * tokens if self.members is None else len(self.members.places)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in (self.features, self.class_attention) if t is not None)


@dataclass(frozen=True, slots=True)
class Members:
    """What k features of an image stand for. Tensors are on the CPU; places are on its own axis of most tiles × tokens."""

    sizes: Tensor
    """(k,) float32."""
    places: Tensor
    """(k,) long, ascending: each cluster's first member."""
    cluster: Tensor
    """(real tiles' tokens,) long: each feature's."""


@dataclass(frozen=True, slots=True)
class Span:
    """Text rows of a prompt that see the same images: all rows from an image's token on, up to the next image's."""

    rows: tuple[int, int]
    images: tuple[int, int]


@dataclass(slots=True, eq=False)
class Decision:
    """What stays of a group's images. Tensors are on the CPU, N = its images × most tiles × tokens."""

    keeps: list[Tensor] = field(default_factory=list)
    """(N,), or (KV, N) where heads of keys have sets of their own, bool: one for all cross-attention layers or one for each."""
    targets: list[Tensor] = field(default_factory=list)
    """As many (N,) long, where the policy merges; see ``Policy.merge``."""
    clustered: bytes | None = None
    """Over which features; see ``_Set.clustered``."""
    channels: list[Tensor] = field(default_factory=list)
    """(KV, key_width) long, one a cross-attention layer, where the policy slices; see ``Policy.channels``. On its device."""


@dataclass(slots=True, eq=False)
class Group:
    """What sequences about the same images have in common, which decide together what stays of them; or one alone."""

    images: Sequence[Image]
    last_images: tuple[int, int]
    """Those that decoding sees: the last one, or the last adjacent ones."""
    id: str
    """Of its first request: what policies that draw are seeded with."""
    size: int = 1
    waiting: int = 1
    """Of its sequences, those that are yet to be prefilled."""
    encoded: list[Encoded] = field(default_factory=list)
    """Its images, from their encoding to the end of the last prefill."""
    decision: Decision | None = None
    """Of several, once they have decided: who is prefilled later, or again, goes by it."""
    cross_need: int | None = None
    """Elements of its segment, once a prefill has found out."""
    keys: tuple[str, ...] = field(init=False)
    """The images'."""
    shown: tuple[Hashable, ...] = field(init=False)
    """Which images these sequences see, and which of them last: what tells apart what is held if all features are kept."""

    def __post_init__(self) -> None:
        self.keys = tuple(image.key for image in self.images)
        self.shown = (self.keys, self.last_images)


@dataclass(slots=True, eq=False)
class Sequence_:
    """One request, from its arrival to its completion."""

    request: Request
    future: Future[Completion]
    spans: list[Span]
    group: Group = field(init=False)
    trim: SampleTrim | None = None
    segment: Segment | None = None
    slot: int = -1
    channels: Sequence[Tensor] = ()
    """(KV, key_width) long, one a cross-attention layer: the channels of its segment's keys, where not all are kept."""
    draws: Sequence[float] = ()
    said: list[int] = field(default_factory=list)
    """Tokens so far."""

    def __post_init__(self) -> None:
        self.group = Group(self.request.images, self.spans[-1].images if self.spans else (0, 0), self.request.id)

    @property
    def capacity(self) -> int:
        """Tokens that its slot needs room for; the last token's keys and values are never computed."""
        return len(self.request.tokens) + self.request.max_new_tokens


def image_spans(tokens: Sequence[int], image_token: int) -> list[Span]:
    """Which rows of a prompt see which images, as ``MllamaProcessor`` has it: text sees the image before it, and every image
    of a row of adjacent ones. Rows before the first image are in no span."""
    places = [i for i, token in enumerate(tokens) if token == image_token]
    spans: list[Span] = []
    first = 0
    for number, place in enumerate(places):
        if number and place != places[number - 1] + 1:
            first = number
        end = places[number + 1] if number + 1 < len(places) else len(tokens)
        spans.append(Span((place, end), (first, number + 1)))
    return spans


def ceil_to(value: int, grain: int) -> int:
    return -(-value // grain) * grain


def packed_positions(images: Sequence[Encoded], tokens: int, most: int, padding: bool) -> Tensor:
    """Where packed features lie on the model's axis of images × most tiles × tokens: first the real tiles' of every image, or
    what they were merged into, then, with ``padding``, those of every unmerged image's padding tiles. (n,) long."""
    real, blank = [], []
    for i, image in enumerate(images):
        own = torch.arange(image.tiles * tokens) if image.members is None else image.members.places
        real.append(own + i * most * tokens)
        if padding and image.members is None:
            blank.append(torch.arange(image.tiles * tokens, most * tokens) + i * most * tokens)
    return torch.cat(real + blank)
