"""Short segments as one tensor, on a CPU: one copy and one product for many of them take less time than a call for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimming.engine.memory import Memory, Segment

BUFFER_ELEMENTS = 1 << 19
"""Keys, or values, that are gathered for one product: they stay in the processor's cache until it has read them."""
LONG_ELEMENTS = 1 << 17
"""From so many on a segment's keys of one layer are read where they lie: a call's own time no longer shows."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Where the keys and values of some segments lie, in each cross-attention layer. S segments, of L rows at most."""

    widths: tuple[int, int]
    """Of keys and of values."""
    starts: Sequence[tuple[Tensor, Tensor]]
    """Where each segment's keys and values begin, (S, 1, 1, 1) int32, in pieces; see ``Memory.piece``."""
    patterns: Sequence[tuple[Tensor, Tensor]]
    """Where they go on from there, (S, KV, L, pieces of a row) int32, padded by the last row."""
    masks: Sequence[Tensor]
    """(S × KV, 1, L) additive: shuts the padding out, and holds the segments' biases."""


class Gather:
    """Copies keys and values of segments in ``memory``, into memory that is there already: fresh pages would take longer than
    the copy."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.buffer = memory.flat.new_empty(0)

    @staticmethod
    def pays(memory: Memory) -> bool:
        """On a CPU, and in float32: in other dtypes the product's logits would be rounded, which attention's are not, and
        answers would depend on who runs beside."""
        return memory.flat.device.type == "cpu" and memory.flat.dtype == torch.float32

    def fits(self, segment: Segment, count: int) -> bool:
        """Whether a segment is short enough, and ``count`` as long as it are at once."""
        elements = segment.longest * self.memory.geometry.kv_heads
        return elements <= LONG_ELEMENTS and count * elements <= BUFFER_ELEMENTS

    def plan(self, segments: Sequence[Segment]) -> Gathered:
        """Of segments that fit together."""
        if not len(self.buffer):
            self.buffer = self.memory.flat.new_empty(BUFFER_ELEMENTS)
        layers = segments[0].layers
        widths = (layers[0].key_width, layers[0].value_width)
        # (6, layers, S): see ``Segment.places``.
        places = torch.stack([segment.places for segment in segments], -1).unflatten(0, (6, -1))
        keys, values = (
            (each // self.memory.piece(width)).int()[..., None, None, None]
            for each, width in zip(places[:2], widths, strict=True)
        )
        lengths, biases = places[4], places[5] if layers[0].bias is not None else None
        patterns: list[tuple[Tensor, Tensor]] = []
        masks: list[Tensor] = []
        for layer, own in enumerate(lengths):
            same = layer > 0 and lengths[layer - 1].equal(own)
            patterns.append(patterns[-1] if same else self._pattern(own, widths))
            begins = None if biases is None else biases[layer]
            same = same and (begins is None or biases is None or biases[layer - 1].equal(begins))
            masks.append(masks[-1] if same else self._mask(own, begins))
        return Gathered(widths, list(zip(keys, values, strict=True)), patterns, masks)

    def keys(self, plan: Gathered, layer: int) -> Tensor:
        """(S × KV, L, width), until the next copy."""
        return self._copy(plan, layer, 0)

    def values(self, plan: Gathered, layer: int) -> Tensor:
        """(S × KV, L, width), until the next copy."""
        return self._copy(plan, layer, 1)

    def _copy(self, plan: Gathered, layer: int, which: int) -> Tensor:
        width = plan.widths[which]
        piece = self.memory.piece(width)
        pattern = plan.patterns[layer][which]
        pieces = (pattern + plan.starts[layer][which]).flatten()
        out = self.buffer[: len(pieces) * piece].view(-1, piece)
        torch.index_select(self.memory.flat[: self.memory.size].view(-1, piece), 0, pieces, out=out)
        return out.view(-1, pattern.shape[2], width)

    def _pattern(self, lengths: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See ``Gathered.patterns``; of segments with these many rows (S,)."""
        places = torch.arange(int(lengths.max())).minimum((lengths[:, None] - 1).clamp(min=0))
        heads = torch.arange(self.memory.geometry.kv_heads)
        rows = (heads[:, None] * lengths[:, None, None] + places[:, None])[..., None]
        pieces = [width // self.memory.piece(width) for width in widths]
        keys, values = ((rows * count + torch.arange(count)).int() for count in pieces)
        return keys, values

    def _mask(self, lengths: Tensor, biases: Tensor | None) -> Tensor:
        """See ``Gathered.masks``; of segments with these many rows (S,), whose biases begin at (S,)."""
        heads = torch.arange(self.memory.geometry.kv_heads)
        places = torch.arange(int(lengths.max()))
        behind = (places >= lengths[:, None])[:, None].expand(-1, len(heads), -1)
        if biases is None:
            mask = torch.zeros(behind.shape)
        else:
            rows = heads[:, None] * lengths[:, None, None] + places
            mask = self.memory.biases[(biases[:, None, None] + rows).masked_fill_(behind, 0)]
        return mask.masked_fill(behind, torch.finfo(torch.float32).min).flatten(0, 1)[:, None]
