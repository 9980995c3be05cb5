"""Prefill: several prompts at once, packed one behind the other, so that nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from trimming.costs import Geometry
from trimming.engine.layers import (
    Rotary,
    attend,
    cross_projections,
    cross_queries,
    crosses,
    fold,
    norm,
    self_projections,
    self_queries,
    unfold,
)
from trimming.engine.memory import Memory, Segment
from trimming.engine.sequence import Encoded, Sequence_, packed_positions
from trimming.engine.sharded import ShardedMemory
from trimming.engine.stages import stages
from trimming.mllama import Rows
from trimming.policies import Policy, VisualContext
from trimming.samples import SampleTrim

# Elements of the scores of one chunk of text rows: 64 MB in fp32.
_CHUNK_ELEMENTS = 1 << 24


class NoRoomError(Exception):
    """The memory has no room for what some sequences keep; their ``cross_need`` says how much. Nothing is left allocated."""


@dataclass(slots=True, eq=False)
class _Group:
    """Sequences that keep the same features of the same images: their keys and values are the same tensors."""

    features: Tensor | None
    """(n, width) to project; None where a running sequence has done it."""
    stored: tuple[int, int]
    """Which of the features decoding sees: those of the last image, or of the last adjacent ones."""
    segment: Segment
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    """(KV, n, D) of the present layer."""
    value: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(slots=True, eq=False)
class _Look:
    """Text rows of one sequence that see the same features."""

    sequence: int
    rows: tuple[int, int]
    """Among the batch's rows that go through cross-attention layers."""
    features: tuple[int, int]
    """Among the sequence's packed features."""
    counts: bool
    """Whether these rows see an image, rather than everything as rows before it do under transformers' rows."""
    kept: tuple[int, int] = (0, 0)
    """``features``, among those it keeps."""


class Prefill:
    """Runs prompts through the language model and leaves their keys and values in ``memory``.

    Args:
        model: where the weights are.
        policy: which visual features stay.
        rows: see ``trimming.trim``.
        memory: sequences come with a slot there; their segments are allocated here.
        rotary: the model's.
    """

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        policy: Policy,
        rows: Rows,
        memory: Memory | ShardedMemory,
        rotary: Rotary,
    ) -> None:
        self.model, self.policy, self.rows, self.memory, self.rotary = model, policy, rows, memory, rotary
        self.text: Any = model.model.language_model
        self.geometry: Geometry = memory.geometry
        self.tokens: int = model.model.vision_model.num_patches
        self.max_tiles: int = model.config.vision_config.max_num_tiles
        self.is_cross = crosses(model)
        self.stages = stages(model)

    def __call__(self, sequences: Sequence[Sequence_]) -> Tensor:
        """Logits (B, V) of the token after each prompt. Sets each sequence's ``segment`` and ``trim``.

        Raises ``NoRoomError``.
        """
        batch = _Batch(self, sequences)
        try:
            return self._run(batch)
        except BaseException:
            for sequence in sequences:
                if sequence.segment is not None:
                    self.memory.release(sequence.segment)
                    sequence.segment = None
            raise

    def _run(self, batch: _Batch) -> Tensor:
        device = self.model.device
        tokens = torch.tensor([t for s in batch.sequences for t in s.request.tokens], device=device)
        states = self.text.embed_tokens(tokens)
        self.rotary.grow(max(batch.lengths), states)
        cos, sin = self.rotary.at(torch.cat([torch.arange(n, device=device) for n in batch.lengths]))
        last = torch.tensor(batch.lengths, device=device).cumsum(0) - 1
        own = crossed = 0
        for stage in self.stages:
            batch.move(stage.device)
            states, cos, sin, last = (t.to(stage.device) for t in (states, cos, sin, last))
            for number in stage.layers:
                layer = self.text.layers[number]
                if not self.is_cross[number]:
                    # Of the last layer only the rows that tell the next tokens are wanted.
                    only = last if number == len(self.is_cross) - 1 else None
                    states = self._self_layer(layer, own, batch, states, (cos, sin), only)
                    own += 1
                else:
                    if batch.looks:
                        self._cross_layer(layer, crossed, batch, states)
                    crossed += 1
        if not batch.decided:
            batch.keep(self._select(batch, None))
        if self.is_cross[-1]:
            states = states[last]
        logits: Tensor = self.model.lm_head(norm(self.text.norm, states))
        return logits

    # ---- self-attention -------------------------------------------------------------------------------------------------

    def _self_layer(
        self, layer: Any, index: int, batch: _Batch, states: Tensor, rotary: tuple[Tensor, Tensor], only: Tensor | None
    ) -> Tensor:
        """The layer's output, of all rows or of the sequences' last ones, which are ``only``."""
        normed = norm(layer.input_layernorm, states)
        key, value = self_projections(layer.self_attn, normed, *rotary)
        asking, lengths = (slice(None), batch.lengths) if only is None else (only, [1] * len(batch.lengths))
        query = self_queries(layer.self_attn, normed[asking], *(t[asking] for t in rotary))
        keys, values = self.memory.slot_layer(index)
        attended = []
        split = zip(query.split(lengths), key.split(batch.lengths), value.split(batch.lengths), strict=True)
        for sequence, parts in zip(batch.sequences, split, strict=True):
            q, k, v = (part.transpose(0, 1) for part in parts)
            keys[sequence.slot, :, : k.shape[1]] = k
            values[sequence.slot, :, : v.shape[1]] = v
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=only is None, scale=layer.self_attn.scaling, enable_gqa=True
            )
            attended.append(out[0].transpose(0, 1))
        states = states[asking] + layer.self_attn.o_proj(torch.cat(attended).flatten(1))
        forward: Tensor = layer.mlp(norm(layer.post_attention_layernorm, states))
        return states + forward

    # ---- cross-attention ------------------------------------------------------------------------------------------------

    def _cross_layer(self, layer: Any, index: int, batch: _Batch, states: Tensor) -> None:
        """Adds the layer to the rows of ``states`` that go through it, in place."""
        attention = layer.cross_attn
        rows = states[batch.rows]
        query = cross_queries(attention, norm(layer.input_layernorm, rows))
        if index == 0 and self.policy.where == "first_layer":
            attended = self._first_layer(attention, batch, query)
        else:
            if index == 0:
                batch.keep(self._select(batch, None))
            self._project(attention, index, batch)
            attended = query.new_empty(len(query), attention.num_heads * attention.head_dim)
            for look in batch.looks:
                group = batch.groups[look.sequence]
                assert group is not None
                (a, b), (c, d) = look.rows, look.kept
                attended[a:b] = attend(query[a:b], group.key[:, c:d], group.value[:, c:d], attention.scaling)
        rows = rows + layer.cross_attn_attn_gate.tanh() * attention.o_proj(attended)
        forward = layer.mlp(norm(layer.post_attention_layernorm, rows))
        if batch.blind is not None:
            forward[batch.blind] = 0
        states[batch.rows] = rows + layer.cross_attn_mlp_gate.tanh() * forward

    def _first_layer(self, attention: Any, batch: _Batch, query: Tensor) -> Tensor:
        """Attends to every feature, scores them on the way, decides, and stores what stays."""
        self._project_first(attention, batch)
        firsts = [self._first_keys(s.encoded) for s in batch.sequences]
        scores = [query.new_zeros(self.geometry.heads, n, dtype=torch.float32) for n in batch.features]
        attended = query.new_empty(len(query), attention.num_heads * attention.head_dim)
        for look in batch.looks:
            (a, b), (c, d), (key, value) = look.rows, look.features, firsts[look.sequence]
            if look.counts:
                attended[a:b], seen = _attend_and_score(query[a:b], key[:, c:d], value[:, c:d], attention.scaling)
                scores[look.sequence][:, c:d] += seen
            else:
                attended[a:b] = attend(query[a:b], key[:, c:d], value[:, c:d], attention.scaling)
        batch.keep(self._select(batch, scores))
        for number, group in batch.new_groups():
            key, value = firsts[number]
            low, high = group.stored
            kept = batch.kept[number][low:high].to(key.device)
            stored = self.memory.segment_layer(group.segment, 0)
            stored[0].copy_(key[:, kept])
            stored[1].copy_(value[:, kept])
        return attended

    def _first_keys(self, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """The first layer's keys and values (KV, n, D) of a sequence's images; empty without any."""
        firsts = [e.first for e in encoded if e.first is not None]
        if not firsts:
            return torch.empty(0), torch.empty(0)
        key, value = (_joined([first[i] for first in firsts], encoded, self.tokens).transpose(0, 1) for i in range(2))
        return key, value

    def _project_first(self, attention: Any, batch: _Batch) -> None:
        """The first layer's keys and values of images that no prompt has needed them of."""
        new = list({id(e): e for s in batch.sequences for e in s.encoded if e.first is None}.values())
        if not new:
            return
        key, value = cross_projections(attention, torch.cat([e.features for e in new]).to(batch.rows.device))
        sizes = [len(e.features) for e in new]
        for encoded, k, v in zip(new, key.split(sizes), value.split(sizes), strict=True):
            # Views would keep all of the batch's images.
            encoded.first = (k.clone(), v.clone())

    def _project(self, attention: Any, index: int, batch: _Batch) -> None:
        """This layer's keys and values of every group, from the memory where they are there already."""
        new = [group for _, group in batch.new_groups()]
        if new:
            sizes = [len(group.features) for group in new]  # type: ignore[arg-type]
            key, value = cross_projections(attention, torch.cat([group.features for group in new]))  # type: ignore[misc]
            for group, k, v in zip(new, key.split(sizes), value.split(sizes), strict=True):
                group.key, group.value = k.transpose(0, 1), v.transpose(0, 1)
                low, high = group.stored
                stored = self.memory.segment_layer(group.segment, index)
                stored[0].copy_(group.key[:, low:high])
                stored[1].copy_(group.value[:, low:high])
        for group in filter(None, batch.groups):
            if group.features is None:
                group.key, group.value = self.memory.segment_layer(group.segment, index)

    # ---- selection ------------------------------------------------------------------------------------------------------

    def _select(self, batch: _Batch, scores: list[Tensor] | None) -> Tensor:
        """(B, N) bool on the CPU, N = the most images × tiles × tokens: what stays."""
        images = max(1, *(len(s.request.images) for s in batch.sequences))
        length = images * self.max_tiles * self.tokens
        device = self.model.device
        valid = torch.zeros(len(batch.sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(batch.sequences):
            for i, encoded in enumerate(sequence.encoded):
                start = i * self.max_tiles * self.tokens
                valid[row, start : start + encoded.tiles * self.tokens] = True
        attention = None
        if scores is not None:
            attention = torch.zeros(len(valid), self.geometry.heads, length, dtype=torch.float32, device=device)
            for row, (seen, positions) in enumerate(zip(scores, batch.positions, strict=True)):
                attention[row, :, positions.to(device)] = seen.to(device)
        context = VisualContext(
            valid=valid.to(device),
            images=images,
            tiles=self.max_tiles,
            tokens=self.tokens,
            sample_ids=tuple(s.request.id for s in batch.sequences),
            attention=attention,
        )
        keep = self.policy.select(context).cpu() if valid.any() else valid
        batch.valid = valid
        if self.rows == "transformers":
            # Rows before the image see padding tiles too, where nothing is trimmed.
            keep = keep | (keep == valid).all(-1, keepdim=True)
        return keep


class _Batch:
    """The rows and features of one prefill, and what is decided about them."""

    def __init__(self, prefill: Prefill, sequences: Sequence[Sequence_]) -> None:
        self.prefill, self.sequences = prefill, sequences
        self.lengths = [len(s.request.tokens) for s in sequences]
        padding = prefill.rows == "transformers"
        tiles = [[e.tiles for e in s.encoded] for s in sequences]
        self.positions = [
            packed_positions(t, prefill.tokens, prefill.max_tiles, padding) if t else torch.zeros(0, dtype=torch.long)
            for t in tiles
        ]
        self.features = [len(p) for p in self.positions]
        self.valid = torch.empty(0)
        self.kept: list[Tensor] = []
        """Each sequence's kept features, as places among its packed ones."""
        self.groups: list[_Group | None] = []
        self.decided = False
        self.looks: list[_Look] = []
        blind: list[int] = []
        rows: list[int] = []
        start = 0
        for number, sequence in enumerate(sequences):
            if sequence.spans:
                before = sequence.spans[0].rows[0]
                ends = [0]
                for count in tiles[number]:
                    ends.append(ends[-1] + count * prefill.tokens)
                if padding and before:
                    self.looks.append(_Look(number, (len(rows), len(rows) + before), (0, self.features[number]), False))
                    blind += range(len(rows), len(rows) + before)
                    rows += range(start, start + before)
                for span in sequence.spans:
                    (a, b), (c, d) = span.rows, span.images
                    self.looks.append(_Look(number, (len(rows), len(rows) + b - a), (ends[c], ends[d]), True))
                    rows += range(start + a, start + b)
            start += self.lengths[number]
        device = prefill.model.device
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.blind = torch.tensor(blind, device=device) if blind else None

    def move(self, device: torch.device) -> None:
        """Takes what the next layers need to their device."""
        self.rows = self.rows.to(device)
        self.blind = None if self.blind is None else self.blind.to(device)
        for _, group in self.new_groups():
            assert group.features is not None
            group.features = group.features.to(device)

    def keep(self, keep: Tensor) -> None:
        """Takes ``keep`` (B, N) bool for decided: groups sequences, and allocates a segment for each group."""
        self.decided = True
        prefill = self.prefill
        self.kept = [keep[row, p].nonzero()[:, 0] for row, p in enumerate(self.positions)]
        for look in self.looks:
            low, high = torch.searchsorted(self.kept[look.sequence], torch.tensor(look.features)).tolist()
            look.kept = (low, high)
        last = {look.sequence: look.kept for look in self.looks}
        mine: dict[Hashable, _Group] = {}
        full = False
        self.groups = [None] * len(self.sequences)
        for number, sequence in enumerate(self.sequences):
            if sequence.encoded:
                self.groups[number] = found = self._group(number, last[number], mine)
                sequence.segment = found.segment if found else None
                full = full or found is None
        if full:
            raise NoRoomError
        for row, sequence in enumerate(self.sequences):
            sequence.trim = self._record(row, keep, prefill)

    def _group(self, number: int, stored: tuple[int, int], mine: dict[Hashable, _Group]) -> _Group | None:
        """The sequence's group, its segment counted as used by it; None where there is no room."""
        memory, sequence, kept = self.prefill.memory, self.sequences[number], self.kept[number]
        share: Hashable = None
        if stored == (0, len(kept)):
            which = None if len(kept) == self.features[number] else kept.numpy().tobytes()
            share = (tuple(image.key for image in sequence.request.images), which)
        segment = memory.find(share)
        if segment is not None:
            return mine.get(share) or _Group(None, stored, segment)
        segment = memory.allocate([stored[1] - stored[0]] * memory.geometry.cross_layers, share=share)
        if segment is None:
            rows = [stored[1] - stored[0]] * memory.geometry.cross_layers
            widths = [memory.geometry.head_dim] * memory.geometry.cross_layers
            sequence.cross_need = memory.segment_elements_for(rows, widths, widths)
            return None
        features = _joined([e.features for e in sequence.encoded], sequence.encoded, self.prefill.tokens)
        features = features if len(kept) == len(features) else features[kept.to(features.device)]
        group = _Group(features.to(self.rows.device), stored, segment)
        if share is not None:
            mine[share] = group
        return group

    def new_groups(self) -> list[tuple[int, _Group]]:
        """Groups whose keys and values this prefill computes, each with the number of one of its sequences."""
        numbered = {id(g): (i, g) for i, g in enumerate(self.groups) if g is not None and g.features is not None}
        return list(numbered.values())

    def _record(self, row: int, keep: Tensor, prefill: Prefill) -> SampleTrim:
        segment, itemsize = self.sequences[row].segment, prefill.memory.itemsize
        # Other sequences of the batch may have more images.
        own = len(self.sequences[row].request.images) * prefill.max_tiles * prefill.tokens
        valid, kept = self.valid[row, :own], keep[row, :own]
        allocated = segment.size * itemsize if segment else 0
        return SampleTrim.of(valid, kept, self.lengths[row], prefill.geometry, itemsize, allocated)


def _joined(parts: Sequence[Tensor], encoded: Sequence[Encoded], tokens: int) -> Tensor:
    """One tensor an image, along its tokens, as one: every image's real tiles, then every image's padding tiles."""
    if len(parts) == 1:
        return parts[0]
    cuts = [(part[: e.tiles * tokens], part[e.tiles * tokens :]) for part, e in zip(parts, encoded, strict=True)]
    return torch.cat([part for side in zip(*cuts, strict=True) for part in side])


def _attend_and_score(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``attend``, and each head's probabilities summed over the rows: (heads, L) float32.

    One pass: the probabilities are needed either way. Rows come in chunks, so that no map of a long prompt is ever whole.
    """
    kv_heads, length = key.shape[:2]
    heads = query.shape[1]
    scores = query.new_zeros(heads, length, dtype=torch.float32)
    attended = []
    for part in query.split(max(1, _CHUNK_ELEMENTS // (heads * length))):
        weights = (fold(part, kv_heads) @ key.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32)
        scores += weights.unflatten(1, (-1, len(part))).sum(2).flatten(0, 1)
        attended.append(unfold(weights.to(value.dtype) @ value, len(part)))
    return torch.cat(attended), scores
