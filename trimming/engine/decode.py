"""Decode: one token for every running sequence, each in its slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from trimming.engine.gather import Gather, Gathered
from trimming.engine.layers import Rotary, as_mask, cross_queries, crosses, norm, self_projections, self_queries
from trimming.engine.memory import Memory, Segment
from trimming.engine.sequence import Sequence_
from trimming.engine.sharded import ShardedMemory
from trimming.engine.stages import stages


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Segments that are attended to in one product, each by as many sequences."""

    size: tuple[int, int]
    """Segments (S), and sequences of each (C)."""
    segments: Segment | Gathered
    """One that is read where it lies, or several short ones."""
    channels: Sequence[Tensor]
    """Of each layer (S, KV, key_width) long: the channels of the keys, where not all are left; see ``Sequence_.channels``."""


@dataclass(frozen=True, slots=True)
class _Members:
    """What follows from which sequences run, on one device; made anew when that changes, never step by step."""

    mask: Tensor
    """(B, 1, 1, capacity) additive: 0 where the slot holds a token. A step opens one place a row."""
    seers: Tensor | None
    """Rows with a segment, in the order of the bundles; None for all of them, in their order."""
    bundles: Sequence[_Bundle]


class Decode:
    """The running sequences and the step that moves them all on by one token. Sequence i of ``running`` has slot i."""

    def __init__(self, model: MllamaForConditionalGeneration, memory: Memory | ShardedMemory, rotary: Rotary) -> None:
        self.model, self.memory, self.rotary = model, memory, rotary
        self.stages = stages(model)
        self.text: Any = model.model.language_model
        self.is_cross = crosses(model)
        self.running: list[Sequence_] = []
        self.positions: list[int] = []
        """Where each sequence's last token stands, whose keys and values are not computed yet."""
        self.tokens = torch.zeros(0, dtype=torch.long, device=model.device)
        """(B,) those tokens."""
        self.changed = True
        """Whether other sequences run, or lie elsewhere, than at the last step."""
        self._members: list[_Members] = []
        """One a stage."""
        self._gather = Gather(memory) if isinstance(memory, Memory) and Gather.pays(memory) else None

    def add(self, sequences: Sequence[Sequence_], tokens: Tensor) -> None:
        """Sequences fresh from their prefill, in the slots after the running ones; ``tokens`` (B,) are their first ones."""
        self.running += sequences
        self.positions += [len(s.request.tokens) for s in sequences]
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens.device)])
        self.changed = True

    def remove(self, sequence: Sequence_) -> None:
        """Its slot is freed; the last slot's sequence moves in."""
        slot, last = sequence.slot, self.memory.close_slot(sequence.slot)
        moved, position = self.running.pop(), self.positions.pop()
        if slot != last:
            self.running[slot], self.positions[slot], moved.slot = moved, position, slot
            self.tokens[slot] = self.tokens[last]
        self.tokens = self.tokens[:last]
        sequence.slot = -1
        self.changed = True

    def resize(self, capacity: int) -> bool:
        """See ``Memory.resize``."""
        self.changed = True
        return self.memory.resize(capacity)

    def slice_keys(self, width: int) -> None:
        """Of every key from now on this many channels are left, each row's in its ``Sequence_.channels``."""

    def weigh(self, weighs: bool) -> None:
        """Whether segments have biases from now on."""

    def warm_up(self) -> None:
        """Does what a first step would have to do besides, where there is any."""

    def release(self) -> bool:
        """Lets go of memory that can be made anew; whether there was any."""
        return False

    def step(self) -> Tensor:
        """Logits (B, V) of each sequence's next token."""
        if self.changed:
            self._members = self._assemble()
            self.changed = False
        positions = torch.tensor(self.positions, device=self.tokens.device)
        reach = max(self.positions) + 1
        places = torch.arange(len(self.running), device=self.tokens.device)
        states = self.text.embed_tokens(self.tokens)
        cos, sin = self.rotary.at(positions)
        own = crossed = 0
        for stage, members in zip(self.stages, self._members, strict=True):
            states, cos, sin, places, positions = (t.to(stage.device) for t in (states, cos, sin, places, positions))
            members.mask[places, 0, 0, positions] = 0
            mask = members.mask[..., :reach]
            for number in stage.layers:
                layer = self.text.layers[number]
                if not self.is_cross[number]:
                    states = self._self_layer(layer, own, states, cos, sin, (places, positions, reach), mask)
                    own += 1
                else:
                    if members.bundles:
                        states = self._cross_layer(layer, crossed, members, states)
                    crossed += 1
        logits: Tensor = self.model.lm_head(norm(self.text.norm, states))
        return logits

    def advance(self, tokens: Tensor) -> None:
        """Takes what the step's logits became, (B,): until then the same step can be taken again."""
        self.tokens = tokens.to(self.tokens.device)
        self.positions = [position + 1 for position in self.positions]

    def _self_layer(
        self, layer: Any, index: int, states: Tensor, cos: Tensor, sin: Tensor, at: tuple[Tensor, Tensor, int], mask: Tensor
    ) -> Tensor:
        attention = layer.self_attn
        normed = norm(layer.input_layernorm, states)
        query = self_queries(attention, normed, cos, sin)
        key, value = self_projections(attention, normed, cos, sin)
        keys, values = self.memory.slot_layer(index)
        places, positions, reach = at
        keys[places, :, positions] = key
        values[places, :, positions] = value
        # The query heads of one key head are rows of one product: no key is repeated.
        grouped = query.unflatten(1, (keys.shape[1], -1))
        attended = F.scaled_dot_product_attention(
            grouped, keys[:, :, :reach], values[:, :, :reach], mask, scale=attention.scaling
        )
        states = states + attention.o_proj(attended.flatten(1))
        forward: Tensor = layer.mlp(norm(layer.post_attention_layernorm, states))
        return states + forward

    def _cross_layer(self, layer: Any, index: int, members: _Members, states: Tensor) -> Tensor:
        attention = layer.cross_attn
        rows = states if members.seers is None else states[members.seers]
        query = cross_queries(attention, norm(layer.input_layernorm, rows))
        # The query heads of one key head are rows of one product: no key is repeated.
        grouped = query.unflatten(1, (self.memory.geometry.kv_heads, -1))
        asking = grouped.split([segments * sharers for segments, sharers in (bundle.size for bundle in members.bundles)])
        attended = torch.cat(
            [
                self._attend_bundle(bundle, index, own, attention.scaling)
                for bundle, own in zip(members.bundles, asking, strict=True)
            ]
        )
        rows = rows + layer.cross_attn_attn_gate.tanh() * attention.o_proj(attended)
        rows = rows + layer.cross_attn_mlp_gate.tanh() * layer.mlp(norm(layer.post_attention_layernorm, rows))
        return rows if members.seers is None else states.index_copy(0, members.seers, rows)

    def _attend_bundle(self, bundle: _Bundle, index: int, query: Tensor, scaling: float) -> Tensor:
        """(S × C, heads × D) of a bundle's queries (S × C, KV, G, D) in cross-attention layer ``index``."""
        (segments, sharers), (kv_heads, group, width) = bundle.size, query.shape[1:]
        asking = query.unflatten(0, (segments, sharers)).transpose(1, 2).reshape(segments, kv_heads, sharers * group, width)
        if bundle.channels:
            channels = bundle.channels[index][:, :, None]
            asking = asking.gather(-1, channels.expand(-1, -1, asking.shape[2], -1))
        if isinstance(bundle.segments, Gathered):
            assert self._gather is not None
            mask, key = bundle.segments.masks[index], self._gather.keys(bundle.segments, index)
            weights = torch.baddbmm(mask, asking.flatten(0, 1), key.transpose(1, 2), alpha=scaling).softmax(-1)
            attended = weights @ self._gather.values(bundle.segments, index)
        else:
            key, value = bundle.segments.views[index]
            attended = F.scaled_dot_product_attention(
                asking, key, value, as_mask(bundle.segments.biases[index], asking), scale=scaling
            )
        return attended.reshape(segments, kv_heads, sharers, group, -1).transpose(1, 2).flatten(2).flatten(0, 1)

    def _assemble(self) -> list[_Members]:
        by: dict[Segment, list[int]] = {}
        for row, sequence in enumerate(self.running):
            if sequence.segment is not None:
                by.setdefault(sequence.segment, []).append(row)
        bundled = self._bundled(by)
        order = [row for segments in bundled for segment in segments for row in by[segment]]
        return [
            _Members(
                mask=self._mask(device),
                seers=None if order == list(range(len(self.running))) else torch.tensor(order, device=device),
                bundles=[self._bundle(segments, [by[segment] for segment in segments]) for segments in bundled],
            )
            for device in (stage.device for stage in self.stages)
        ]

    def _bundled(self, by: Mapping[Segment, Sequence[int]]) -> list[list[Segment]]:
        """Segments that go through one product: as many sequences share each, and they are about as long."""
        bundles: list[list[Segment]] = []
        for segment in sorted(by, key=lambda segment: (len(by[segment]), segment.longest)):
            last = bundles[-1] if bundles else []
            alike = bool(last) and len(by[last[0]]) == len(by[segment])
            if alike and self._gather is not None and self._gather.fits(segment, len(last) + 1):
                last.append(segment)
            else:
                bundles.append([segment])
        return bundles

    def _bundle(self, segments: Sequence[Segment], rows: Sequence[Sequence[int]]) -> _Bundle:
        """Of these segments, to each of which as many running sequences attend."""
        channels = zip(*(self.running[each[0]].channels for each in rows), strict=True)
        held = self._gather.plan(segments) if self._gather is not None and len(segments) > 1 else segments[0]
        return _Bundle((len(segments), len(rows[0])), held, [torch.stack(layer) for layer in channels])

    def _mask(self, device: torch.device) -> Tensor:
        places = torch.arange(self.memory.capacity, device=device)
        closed = places >= torch.tensor(self.positions, device=device)[:, None]
        mask = torch.zeros(closed.shape, dtype=self.model.dtype, device=device)
        return mask.masked_fill(closed, torch.finfo(mask.dtype).min)[:, None, None]
