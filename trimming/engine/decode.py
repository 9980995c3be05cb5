"""Decode: one token for every running sequence, each in its slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from trimming.engine.layers import Rotary, attend, cross_queries, crosses, norm, self_projections, self_queries
from trimming.engine.memory import Memory, Segment
from trimming.engine.sequence import Sequence_
from trimming.engine.sharded import ShardedMemory
from trimming.engine.stages import stages


@dataclass(frozen=True, slots=True)
class _Members:
    """What follows from which sequences run, on one device; made anew when that changes, never step by step."""

    mask: Tensor
    """(B, 1, 1, capacity) additive: 0 where the slot holds a token. A step opens one place a row."""
    seers: Tensor | None
    """Rows with a segment, ascending; None for all of them."""
    alone: list[int]
    """Seers (by their place among these) whose segment nobody shares."""
    channels: list[list[Tensor]] | None
    """In each cross-attention layer, the channels of their keys; see ``Sequence_.channels``. None where all have all."""
    views: list[list[tuple[Tensor, Tensor]]]
    """In each cross-attention layer, their keys and values; see ``Segment.views``."""
    shared: list[tuple[Segment, Tensor]]
    """The other segments, with the seers that share them."""
    order: Tensor | None
    """Where among ``alone`` and the sharers, one behind the other, each seer stands; None where they are in order."""


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
                    if members.alone or members.shared:
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
        grouped, scale = query.unflatten(1, (self.memory.geometry.kv_heads, -1)), attention.scaling
        asking = [grouped[place : place + 1] for place in members.alone]
        if members.channels is not None:
            asking = [_sliced(each, channels) for each, channels in zip(asking, members.channels[index], strict=True)]
        attended = [
            # The query heads of one key head are rows of one product. Most segments have one row, whose queries lie as they
            # must; this runs for each sequence in each layer, so its every call counts.
            F.scaled_dot_product_attention(each, key, value, scale=scale).flatten(1)
            for each, (key, value) in zip(asking, members.views[index] if members.views else (), strict=True)
        ]
        for segment, sharers in members.shared:
            key, value = self.memory.segment_layer(segment, index)
            attended.append(attend(query[sharers], key, value, scale))
        together = torch.cat(attended)
        together = together if members.order is None else together[members.order]
        rows = rows + layer.cross_attn_attn_gate.tanh() * attention.o_proj(together)
        rows = rows + layer.cross_attn_mlp_gate.tanh() * layer.mlp(norm(layer.post_attention_layernorm, rows))
        return rows if members.seers is None else states.index_copy(0, members.seers, rows)

    def _assemble(self) -> list[_Members]:
        seers = [row for row, sequence in enumerate(self.running) if sequence.segment is not None]
        by: dict[Segment, list[int]] = {}
        for place, row in enumerate(seers):
            by.setdefault(self.running[row].segment, []).append(place)  # type: ignore[arg-type]
        single = [(segment, places[0]) for segment, places in by.items() if len(places) == 1]
        several = {segment: places for segment, places in by.items() if len(places) > 1}
        stand = [place for _, place in single] + [place for places in several.values() for place in places]
        views = [list(layer) for layer in zip(*(segment.views for segment, _ in single), strict=True)]
        owners = [self.running[seers[place]] for _, place in single]
        channels = [list(layer) for layer in zip(*(owner.channels for owner in owners), strict=True)] or None
        return [
            _Members(
                mask=self._mask(device),
                seers=None if len(seers) == len(self.running) else torch.tensor(seers, device=device),
                alone=[place for _, place in single],
                channels=channels,
                views=views,
                shared=[(segment, torch.tensor(places, device=device)) for segment, places in several.items()],
                order=None if stand == sorted(stand) else torch.tensor(stand, device=device).argsort(),
            )
            for device in (stage.device for stage in self.stages)
        ]

    def _mask(self, device: torch.device) -> Tensor:
        places = torch.arange(self.memory.capacity, device=device)
        closed = places >= torch.tensor(self.positions, device=device)[:, None]
        mask = torch.zeros(closed.shape, dtype=self.model.dtype, device=device)
        return mask.masked_fill(closed, torch.finfo(mask.dtype).min)[:, None, None]


def _sliced(query: Tensor, channels: Tensor) -> Tensor:
    """(1, KV, G, d) of queries (1, KV, G, D), of each key head the channels (KV, d) that its keys have left."""
    return query.gather(-1, channels[None, :, None].expand(*query.shape[:3], -1))
