"""The memory of keys and values: one flat tensor of a fixed size, so that what fits is known and nothing is ever reallocated.

From its low end it holds *slots*, one a running sequence: the self-attention layers' cache, preallocated for the slot's whole
length, slot after slot, so that a decode step sees all of them as one strided tensor. From its high end it holds *segments*:
the cross-attention layers' cache of what a sequence kept of its images, ragged, of any rows and channels a layer, and shared
between the sequences that kept the same of the same images. The two grow towards each other: the less a policy keeps, the more
sequences run. Lengths are in elements of the model's dtype unless they say bytes.
"""

from __future__ import annotations

import math
import os
from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimming.costs import Geometry

MOVED_ELEMENTS = 1 << 25
"""Elements that are moved at once when slots are resized, but for one layer's of very long slots."""
GRAIN = 64
"""Segments begin and end at multiples of this, for aligned loads."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a cross-attention layer's keys (KV, rows, key_width) and values (KV, rows, value_width) lie, and what is added to
    its logits."""

    key: int
    value: int
    rows: int
    key_width: int
    value_width: int
    bias: int | None
    """(KV, rows) float32, in float32's size; layers that keep the same have them in common. None: nothing is added."""


@dataclass(slots=True, eq=False)
class Segment:
    """Cross-attention keys and values of one kept set."""

    start: int
    size: int
    layers: tuple[Extent, ...]
    """One a cross-attention layer; their rows may differ."""
    views: tuple[tuple[Tensor, Tensor], ...]
    """Their keys (1, KV, rows, key_width) and values (1, KV, rows, value_width)."""
    biases: tuple[Tensor | None, ...]
    """Theirs, (KV, rows) float32."""
    share: Hashable | None
    """What a sequence must have in common with this one to use it too; None: nothing can."""
    users: int = 1
    longest: int = field(init=False)
    """Elements of the longest layer's keys or values, of one head."""
    places: Tensor = field(init=False)
    """(6 × cross-attention layers,) long, on the CPU: where each layer's keys begin, then each one's values; the strides from
    head to head of keys, then of values; rows; where biases begin, in float32's size."""

    @property
    def distinct_biases(self) -> list[Tensor]:
        """``biases``, those of several layers once."""
        each = zip(self.layers, self.biases, strict=True)
        return list({(own.device, layer.bias): own for layer, own in each if own is not None}.values())

    def __post_init__(self) -> None:
        rows = [(e.key, e.value, e.rows * e.key_width, e.rows * e.value_width, e.rows, e.bias or 0) for e in self.layers]
        self.longest = max((e.rows * max(e.key_width, e.value_width) for e in self.layers), default=0)
        # Part of a model on several devices may have no cross-attention layer.
        self.places = torch.tensor(rows, dtype=torch.long).view(-1, 6).T.flatten()


class Memory:
    """Slots and segments in ``kv_bytes`` of memory.

    ``geometry`` is the model's. On a CPU the tensor's pages cost nothing until they are written.
    """

    def __init__(self, geometry: Geometry, kv_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry, self.itemsize = geometry, dtype.itemsize
        self.size = kv_bytes // dtype.itemsize // GRAIN * GRAIN
        self.scratch = self.size
        """A place behind everything, with room for one token's keys in one layer: for kernels that must write somewhere."""
        self.flat = torch.empty(self.size + geometry.kv_heads * geometry.head_dim, dtype=dtype, device=device)
        self.biases = self.flat[: self.size].view(torch.float32)
        """The same memory, as float32, which biases are in: the Triton kernel adds them as they are."""
        self.capacity = 0
        """Tokens that a slot has room for."""
        self.slots = 0
        """Slots in use: always the first ones."""
        self.holes: list[tuple[int, int]] = [(0, self.size)]
        """(start, size) of what is free, ascending."""
        self.shared: dict[Hashable, Segment] = {}
        self.segment_elements = self.peak_elements = self.peak_segment_elements = 0

    # ---- slots ----------------------------------------------------------------------------------------------------------

    @property
    def slot_elements(self) -> int:
        """Length of a slot: (self layers, keys and values, KV, capacity, head_dim)."""
        return self.slot_elements_for(self.capacity)

    def slot_elements_for(self, capacity: int) -> int:
        geometry = self.geometry
        return geometry.self_layers * 2 * geometry.kv_heads * capacity * geometry.head_dim

    def open_slots(self, count: int) -> bool:
        """``count`` more slots, the next ones; False where a segment or the end is in the way."""
        need, frontier = count * self.slot_elements, self.slots * self.slot_elements
        if need and (not self.holes or self.holes[0][0] != frontier or self.holes[0][1] < need):
            return False
        self._take(0, frontier, need)
        # Attention gives a place that is not written yet no weight, but no weight times NaN is NaN.
        self.flat[frontier : frontier + need] = 0
        self.slots += count
        return True

    def close_slot(self, slot: int) -> int:
        """Frees ``slot``; the last one's content moves in, so that slots stay the first ones. Returns the moved one."""
        last = self.slots - 1
        size = self.slot_elements
        if slot != last:
            self.flat[slot * size : (slot + 1) * size] = self.flat[last * size : (last + 1) * size]
        self.slots = last
        self._give(last * size, size)
        return last

    def resize(self, capacity: int) -> bool:
        """Gives every slot room for ``capacity`` tokens, its first ones kept; False where that does not fit."""
        old, new, slots = self.slot_elements, self.slot_elements_for(capacity), self.slots
        if slots and new > old:
            need, frontier = slots * (new - old), slots * old
            if not self.holes or self.holes[0][0] != frontier or self.holes[0][1] < need:
                return False
            self._take(0, frontier, need)
        if slots and new != old:
            self._move_slots(capacity)
        if slots and new < old:
            self._give(slots * new, slots * (old - new))
        self.capacity = capacity
        return True

    def _move_slots(self, capacity: int) -> None:
        """Each slot to where it begins with this capacity, in pieces of whole layers by way of one buffer: nothing else is
        allocated, so that running out of memory shows before anything has moved."""
        old, new, common = self.slot_elements, self.slot_elements_for(capacity), min(capacity, self.capacity)
        layer = self.slot_elements_for(common) // (2 * self.geometry.self_layers)
        halves = 2 * self.geometry.self_layers
        group = max(1, min(halves, MOVED_ELEMENTS // max(1, layer)))
        buffer = self.flat.new_empty(group * layer)
        pieces = [(slot, first) for slot in range(self.slots) for first in range(0, halves, group)]
        # Old and new places overlap: those that move up go from the last one on.
        for slot, first in reversed(pieces) if new > old else pieces:
            come, go = (
                self._slot(slot * size, room).flatten(0, 1)[first : first + group]
                for size, room in ((old, self.capacity), (new, capacity))
            )
            kept = come[..., :common, :]
            held = buffer[: kept.numel()].view(kept.shape)
            held.copy_(kept)
            go[..., :common, :] = held
            go[..., common:, :] = 0

    def slot_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of self-attention layer ``layer`` in all slots, as views (slots, KV, capacity, head_dim)."""
        geometry = self.geometry
        one = geometry.kv_heads * self.capacity * geometry.head_dim
        shape = (self.slots, geometry.kv_heads, self.capacity, geometry.head_dim)
        strides = (self.slot_elements, self.capacity * geometry.head_dim, geometry.head_dim, 1)
        key, value = (self.flat.as_strided(shape, strides, (2 * layer + i) * one) for i in range(2))
        return key, value

    def _slot(self, start: int, capacity: int) -> Tensor:
        geometry = self.geometry
        whole = self.flat[start : start + self.slot_elements_for(capacity)]
        return whole.view(geometry.self_layers, 2, geometry.kv_heads, capacity, geometry.head_dim)

    # ---- segments -------------------------------------------------------------------------------------------------------

    def segment_elements_for(
        self, rows: Sequence[int], key_widths: Sequence[int], value_widths: Sequence[int], biases: int = 0
    ) -> int:
        """Length of a segment with these rows and channels in each cross-attention layer. ``biases``: see ``allocate``."""
        kv = self.geometry.kv_heads
        sizes = zip(rows, key_widths, value_widths, strict=True)
        own = sum(_grains(kv * n * key) + _grains(kv * n * value) for n, key, value in sizes)
        return own + sum(self._bias_elements(n) for n in rows[:biases])

    def _bias_elements(self, rows: int) -> int:
        return _grains(self.geometry.kv_heads * rows * torch.float32.itemsize // self.itemsize)

    def find(self, share: Hashable | None) -> Segment | None:
        """A live segment to share, counted as one more user's."""
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
        """A segment with ``rows`` in each cross-attention layer; None where no hole is large enough.

        Widths default to the head dimension: a policy that slices channels gives its own. ``biases`` is how many there are: 0,
        1 for all layers, which have as many rows then, or as many as layers.
        """
        geometry = self.geometry
        key_widths = key_widths or [geometry.head_dim] * len(rows)
        value_widths = value_widths or [geometry.head_dim] * len(rows)
        size = self.segment_elements_for(rows, key_widths, value_widths, biases)
        # From the high end, so that slots find the low one free.
        index = next((i for i in reversed(range(len(self.holes))) if self.holes[i][1] >= size), None)
        if index is None and size:
            return None
        start = 0
        if index is not None:
            start = sum(self.holes[index]) - size
            self._take(index, start, size)
        at, begins = start, []
        for n in rows[:biases]:
            begins.append(at * self.itemsize // torch.float32.itemsize)
            at += self._bias_elements(n)
        extents = []
        for layer, (n, key, value) in enumerate(zip(rows, key_widths, value_widths, strict=True)):
            values = at + _grains(geometry.kv_heads * n * key)
            extents.append(Extent(at, values, n, key, value, begins[min(layer, biases - 1)] if begins else None))
            at = values + _grains(geometry.kv_heads * n * value)
        views, added = tuple(map(self._views, extents)), tuple(map(self._bias, extents))
        segment = Segment(start, size, tuple(extents), views, added, share)
        if share is not None:
            self.shared[share] = segment
        self.segment_elements += size
        self.peak_segment_elements = max(self.peak_segment_elements, self.segment_elements)
        return segment

    def release(self, segment: Segment) -> None:
        """One user less; the last one frees it."""
        segment.users -= 1
        if segment.users:
            return
        if segment.share is not None:
            del self.shared[segment.share]
        self.segment_elements -= segment.size
        self._give(segment.start, segment.size)

    def segment_layer(self, segment: Segment, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (KV, rows, key_width) and values (KV, rows, value_width) of cross-attention layer ``layer``, as views."""
        key, value = segment.views[layer]
        return key[0], value[0]

    def piece(self, width: int) -> int:
        """The largest part of a row of so many channels such that all segments begin and end between two parts."""
        return math.gcd(GRAIN, width)

    def _views(self, extent: Extent) -> tuple[Tensor, Tensor]:
        kv = self.geometry.kv_heads
        key = self.flat[extent.key : extent.key + kv * extent.rows * extent.key_width]
        value = self.flat[extent.value : extent.value + kv * extent.rows * extent.value_width]
        return key.view(1, kv, extent.rows, extent.key_width), value.view(1, kv, extent.rows, extent.value_width)

    def _bias(self, extent: Extent) -> Tensor | None:
        if extent.bias is None:
            return None
        kv = self.geometry.kv_heads
        return self.biases[extent.bias : extent.bias + kv * extent.rows].view(kv, extent.rows)

    # ---- room -----------------------------------------------------------------------------------------------------------

    def fits(self, slots: int, capacity: int, segments: int) -> bool:
        """Whether this many slots for ``capacity`` tokens, and segments of so many elements in all, have room together."""
        return slots * self.slot_elements_for(capacity) + segments <= self.size

    @property
    def free(self) -> int:
        return sum(size for _, size in self.holes)

    @property
    def peak_bytes(self) -> int:
        return self.peak_elements * self.itemsize

    @property
    def peak_segment_bytes(self) -> int:
        return self.peak_segment_elements * self.itemsize

    def reset_peaks(self) -> None:
        self.peak_elements, self.peak_segment_elements = self.size - self.free, self.segment_elements

    def _take(self, index: int, start: int, size: int) -> None:
        """Takes (start, size) out of hole ``index``, at one of its ends."""
        if not size:
            return
        begin, length = self.holes.pop(index)
        rest = (start + size, length - size) if start == begin else (begin, length - size)
        if rest[1]:
            self.holes.insert(index, rest)
        self.peak_elements = max(self.peak_elements, self.size - self.free)

    def _give(self, start: int, size: int) -> None:
        """Frees (start, size), joined with what is free beside it."""
        if not size:
            return
        insort(self.holes, (start, size))
        joined: list[tuple[int, int]] = []
        for begin, length in self.holes:
            if joined and sum(joined[-1]) == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self.holes = joined


def _grains(elements: int) -> int:
    return -(-elements // GRAIN) * GRAIN


LEAST_SPARE = 1 << 28
"""Bytes for keys and values, on a device however full."""


def slack(total: float) -> float:
    """Bytes of a device with ``total`` that neither weights, keys and values nor activations may count on: captured graphs,
    libraries' workspaces, kernels, and what fragmentation costs the allocator. An estimate until a GPU has been measured."""
    return (1 << 30) + total / 50


def spare_bytes(device: torch.device, others: int = 0) -> int:
    """What keys and values may take of a device that holds its model already: what is free, less ``slack`` and ``others``
    (activations and cached images). On a CPU a quarter of what is free, 4 GiB at most: other processes live there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(LEAST_SPARE, free - others - round(slack(total)))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(LEAST_SPARE, min(4 << 30, free // 4))
