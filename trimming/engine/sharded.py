"""The memory of a model on several devices: one for each stage, holding the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from trimming.costs import Geometry
from trimming.engine.memory import Memory, Segment


class ShardedMemory:
    """``Memory``, over the memories of the stages: each holds its layers' share of every slot and every segment.

    What fits into all of them fits; where one has no room, nothing is left allocated in the others.
    """

    def __init__(
        self, geometries: Sequence[Geometry], kv_bytes: Sequence[int], dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        each = zip(geometries, kv_bytes, devices, strict=True)
        self.parts = [Memory(geometry, count, dtype, device) for geometry, count, device in each]
        self.geometry = Geometry(
            self_layers=sum(g.self_layers for g in geometries),
            cross_layers=sum(g.cross_layers for g in geometries),
            heads=geometries[0].heads,
            kv_heads=geometries[0].kv_heads,
            head_dim=geometries[0].head_dim,
        )
        self.itemsize = dtype.itemsize
        self.size = sum(part.size for part in self.parts)
        self.shared: dict[Hashable, Segment] = {}
        self._pieces: dict[Segment, list[Segment]] = {}
        self._own = [(part, layer) for part in self.parts for layer in range(part.geometry.self_layers)]
        ends = accumulate((part.geometry.cross_layers for part in self.parts), initial=0)
        self._cross = list(pairwise(ends))
        """Each part's cross-attention layers."""

    # ---- slots ----------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return self.parts[0].capacity

    @property
    def slots(self) -> int:
        return self.parts[0].slots

    def slot_elements_for(self, capacity: int) -> int:
        return sum(part.slot_elements_for(capacity) for part in self.parts)

    def open_slots(self, count: int) -> bool:
        """See ``Memory.open_slots``."""

        def close(part: Memory) -> None:
            for _ in range(count):
                part.close_slot(part.slots - 1)

        return self._all(lambda part: part.open_slots(count), close)

    def close_slot(self, slot: int) -> int:
        """See ``Memory.close_slot``."""
        moved = {part.close_slot(slot) for part in self.parts}
        return moved.pop()

    def resize(self, capacity: int) -> bool:
        """See ``Memory.resize``."""
        before = self.capacity
        return self._all(lambda part: part.resize(capacity), lambda part: part.resize(before))

    def slot_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """See ``Memory.slot_layer``; on the layer's device."""
        part, number = self._own[layer]
        return part.slot_layer(number)

    def _all(self, do: Callable[[Memory], bool], undo: Callable[[Memory], object]) -> bool:
        """Whether all parts did; where one could not, those before it have undone it."""
        for number, part in enumerate(self.parts):
            if not do(part):
                for done in self.parts[:number]:
                    undo(done)
                return False
        return True

    # ---- segments -------------------------------------------------------------------------------------------------------

    @property
    def segment_elements(self) -> int:
        return sum(part.segment_elements for part in self.parts)

    def segment_elements_for(
        self, rows: Sequence[int], key_widths: Sequence[int], value_widths: Sequence[int], biases: int = 0
    ) -> int:
        """See ``Memory.segment_elements_for``."""
        shares = zip(self.parts, self._cross, strict=True)
        return sum(
            part.segment_elements_for(rows[a:b], key_widths[a:b], value_widths[a:b], _biases_of(biases, a, b))
            for part, (a, b) in shares
        )

    def find(self, share: Hashable | None) -> Segment | None:
        """See ``Memory.find``."""
        segment = self.shared.get(share) if share is not None else None
        if segment is not None:
            segment.users += 1
        return segment

    def allocate(
        self,
        rows: Sequence[int],
        key_widths: Sequence[int] | None = None,
        value_widths: Sequence[int] | None = None,
        share: Hashable | None = None,
        biases: int = 0,
    ) -> Segment | None:
        """See ``Memory.allocate``; a part of the segment lies on each device."""
        pieces: list[Segment] = []

        def take(part: Memory) -> bool:
            a, b = self._cross[len(pieces)]
            widths = key_widths and key_widths[a:b], value_widths and value_widths[a:b]
            piece = part.allocate(rows[a:b], *widths, biases=_biases_of(biases, a, b))
            pieces.extend([piece] if piece else [])
            return piece is not None

        if not self._all(take, lambda part: part.release(pieces[self.parts.index(part)])):
            return None
        layers = tuple(extent for piece in pieces for extent in piece.layers)
        views = tuple(view for piece in pieces for view in piece.views)
        added = tuple(bias for piece in pieces for bias in piece.biases)
        segment = Segment(pieces[0].start, sum(piece.size for piece in pieces), layers, views, added, share)
        self._pieces[segment] = pieces
        if share is not None:
            self.shared[share] = segment
        return segment

    def release(self, segment: Segment) -> None:
        """See ``Memory.release``."""
        segment.users -= 1
        if segment.users:
            return
        if segment.share is not None:
            del self.shared[segment.share]
        for part, piece in zip(self.parts, self._pieces.pop(segment), strict=True):
            part.release(piece)

    def segment_layer(self, segment: Segment, layer: int) -> tuple[Tensor, Tensor]:
        """See ``Memory.segment_layer``; on the layer's device."""
        key, value = segment.views[layer]
        return key[0], value[0]

    # ---- room -----------------------------------------------------------------------------------------------------------

    def fits(self, slots: int, capacity: int, segments: int) -> bool:
        """See ``Memory.fits``."""
        layers = self.geometry.cross_layers
        return all(
            part.fits(slots, capacity, segments * part.geometry.cross_layers // layers if layers else 0) for part in self.parts
        )

    @property
    def peak_bytes(self) -> int:
        return sum(part.peak_bytes for part in self.parts)

    @property
    def peak_segment_bytes(self) -> int:
        return sum(part.peak_segment_bytes for part in self.parts)

    def reset_peaks(self) -> None:
        for part in self.parts:
            part.reset_peaks()


def _biases_of(biases: int, first: int, end: int) -> int:
    """How many of a segment's biases a part holds whose cross-attention layers are those from ``first`` to ``end``."""
    return min(biases, end - first)
