"""Prefill: several prompts at once, packed one behind the other, so that nothing is computed for padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from trimming.attention import CHUNK_ELEMENTS
from trimming.costs import Geometry
from trimming.engine.layers import (
    Rotary,
    attend,
    cross_projections,
    cross_queries,
    crosses,
    fold,
    mlp,
    norm,
    self_attend,
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
from trimming.selection import merged

DECISIONS = 1024
"""Images, or rows of images, of which it is remembered what stays."""


class NoRoomError(Exception):
    """The memory has no room for what some sequences keep; their ``cross_need`` says how much. Nothing is left allocated."""


@dataclass(slots=True, eq=False)
class _Group:
    """Sequences that keep the same features of the same images: their keys and values are the same tensors."""

    features: Tensor | None
    """(n, width) to project, with what was merged into them; None where a running sequence has done it."""
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
        # What was decided by images alone, the oldest dropped first.
        self._decided: OrderedDict[Hashable, tuple[Tensor, Tensor | None]] = OrderedDict()

    def __call__(self, sequences: Sequence[Sequence_]) -> Tensor:
        """Logits (B, V) of the token after each prompt. Sets each sequence's ``segment`` and ``trim``.

        Raises ``NoRoomError``.
        """
        for sequence in sequences:
            # An earlier prefill of it may have broken off, or its decoding.
            sequence.channels = []
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
        for sequence, (q, k, v) in zip(batch.sequences, split, strict=True):
            keys[sequence.slot, :, : len(k)] = k.transpose(0, 1)
            values[sequence.slot, :, : len(v)] = v.transpose(0, 1)
            attended.append(self_attend(q, k, v, layer.self_attn.scaling, causal=only is None))
        states = states[asking] + layer.self_attn.o_proj(torch.cat(attended))
        return states + mlp(layer.mlp, norm(layer.post_attention_layernorm, states))

    # ---- cross-attention ------------------------------------------------------------------------------------------------

    def _cross_layer(self, layer: Any, index: int, batch: _Batch, states: Tensor) -> None:
        """Adds the layer to the rows of ``states`` that go through it, in place."""
        attention = layer.cross_attn
        rows = states[batch.rows]
        query = cross_queries(attention, norm(layer.input_layernorm, rows))
        if self.policy.where == "each_layer" or (index == 0 and self.policy.where == "first_layer"):
            attended = self._full_layer(attention, index, batch, query)
        else:
            if index == 0:
                batch.keep(self._select(batch, None))
            self._project(attention, index, batch, query)
            attended = query.new_empty(len(query), attention.num_heads * attention.head_dim)
            for look in batch.looks:
                group = batch.groups[look.sequence]
                assert group is not None
                (a, b), (c, d) = look.rows, look.kept
                attended[a:b] = attend(query[a:b], group.key[:, c:d], group.value[:, c:d], attention.scaling)
        rows = rows + layer.cross_attn_attn_gate.tanh() * attention.o_proj(attended)
        forward = mlp(layer.mlp, norm(layer.post_attention_layernorm, rows))
        if batch.blind is not None:
            forward[batch.blind] = 0
        states[batch.rows] = rows + layer.cross_attn_mlp_gate.tanh() * forward

    def _full_layer(self, attention: Any, index: int, batch: _Batch, query: Tensor) -> Tensor:
        """Attends to every feature, scores them on the way, decides, and stores what stays."""
        keys = self._full_keys(attention, index, batch)
        scores = [query.new_zeros(self.geometry.heads, n, dtype=torch.float32) for n in batch.features]
        recent = [torch.zeros_like(s) for s in scores] if "recent" in self.policy.looks_at else None
        attended = query.new_empty(len(query), attention.num_heads * attention.head_dim)
        for look in batch.looks:
            (a, b), (c, d), (key, value) = look.rows, look.features, keys[look.sequence]
            if look.counts:
                attended[a:b], seen = _attend_and_score(query[a:b], key[:, c:d], value[:, c:d], attention.scaling)
                scores[look.sequence][:, c:d] += seen
                last = max(a, batch.ends[look.sequence] - self.policy.recent_rows)
                if recent is not None and last < b:
                    _, seen = _attend_and_score(query[last:b], key[:, c:d], value[:, c:d], attention.scaling)
                    recent[look.sequence][:, c:d] += seen
            else:
                attended[a:b] = attend(query[a:b], key[:, c:d], value[:, c:d], attention.scaling)
        keep = self._select(batch, scores, recent)
        if self.policy.where == "each_layer":
            self._hold(attention, index, batch, query, keep, keys)
            return attended
        batch.keep(keep)
        for number, group in batch.new_groups():
            key, value = keys[number]
            low, high = group.stored
            kept = batch.kept[number][low:high].to(key.device)
            if self.policy.merges:
                assert group.features is not None
                key, value = (t.transpose(0, 1) for t in cross_projections(attention, group.features))
                kept = torch.arange(low, high, device=key.device)
            self._store(group, 0, batch, number, query, key[:, kept], value[:, kept])
        return attended

    def _full_keys(self, attention: Any, index: int, batch: _Batch) -> list[tuple[Tensor, Tensor]]:
        """Each sequence's keys and values (KV, n, D) of all of its images' features; empty without any."""
        # The first layer's are kept for other questions about the image; every layer's would take too much memory.
        found = {id(e): e.first for s in batch.sequences for e in s.encoded} if index == 0 else {}
        new = list({id(e): e for s in batch.sequences for e in s.encoded if found.get(id(e)) is None}.values())
        if new:
            key, value = cross_projections(attention, torch.cat([e.features for e in new]).to(batch.rows.device))
            sizes = [len(e.features) for e in new]
            for encoded, k, v in zip(new, key.split(sizes), value.split(sizes), strict=True):
                found[id(encoded)] = (k, v)
                if index == 0:
                    # Views would keep all of the batch's images.
                    found[id(encoded)] = encoded.first = (k.clone(), v.clone())
        return [self._of_sequence([found[id(e)] for e in s.encoded], s.encoded) for s in batch.sequences]  # type: ignore[misc]

    def _of_sequence(self, parts: Sequence[tuple[Tensor, Tensor]], encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        if not parts:
            return torch.empty(0), torch.empty(0)
        key, value = (_joined([part[i] for part in parts], encoded, self.tokens).transpose(0, 1) for i in range(2))
        return key, value

    def _hold(
        self, attention: Any, index: int, batch: _Batch, query: Tensor, keep: Tensor, keys: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Takes what this layer keeps for itself; after the last one the segments are allocated and filled."""
        # Decoding sees the last image, or the last adjacent ones.
        last = {look.sequence: look.features for look in batch.looks}
        for number, (low, high) in last.items():
            key, value = keys[number]
            packed = keep[number][..., batch.positions[number]]
            # Padding tiles, which transformers' rows keep where nothing is trimmed, are not counted.
            stayed = packed & batch.valid[number, batch.positions[number]]
            batch.counts[number].append(int(stayed.sum()) // (len(key) if packed.dim() == 2 else 1))
            packed = packed.to(key.device)
            packed[..., :low] = packed[..., high:] = False
            key, value = self._kept(attention, batch, number, packed, key, value)
            batch.held[number].append((self._slice(batch, number, query, key), value))
        batch.saw(keep if keep.dim() == 2 else keep.any(1))
        if index == self.geometry.cross_layers - 1:
            batch.keep_layers()

    def _kept(
        self, attention: Any, batch: _Batch, number: int, keep: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of a sequence's keys and values (KV, n, D) what ``keep``, (n,) or (KV, n) bool, leaves of them."""
        if keep.dim() == 2:
            # As many in each head, each head its own.
            places = keep.nonzero()[:, 1].view(len(keep), -1, 1)
            return key.gather(1, places.expand(-1, -1, key.shape[-1])), value.gather(1, places.expand(-1, -1, value.shape[-1]))
        places = keep.nonzero()[:, 0]
        if not self.policy.merges:
            return key[:, places], value[:, places]
        features = batch.merged(number, keep)
        features = features[places.to(features.device)].to(key.device)
        key, value = cross_projections(attention, features)
        return key.transpose(0, 1), value.transpose(0, 1)

    def _slice(self, batch: _Batch, number: int, query: Tensor, key: Tensor) -> Tensor:
        """``key`` (KV, n, D) with the channels that the policy leaves, of which the sequence takes a note."""
        if not self.policy.slices:
            return key
        # The rows that see what decoding will see.
        last = [look.rows for look in batch.looks if look.sequence == number and look.counts][-1]
        channels = self.policy.channels(fold(query[slice(*last)], len(key)), key)
        batch.sequences[number].channels.append(channels)
        return key.gather(-1, channels[:, None].expand(-1, key.shape[1], -1))

    def _store(self, group: _Group, index: int, batch: _Batch, number: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes what a group keeps (KV, n, D) into its segment; ``number`` is one of its sequences."""
        stored = self.memory.segment_layer(group.segment, index)
        stored[0].copy_(self._slice(batch, number, query, key))
        stored[1].copy_(value)

    def _project(self, attention: Any, index: int, batch: _Batch, query: Tensor) -> None:
        """This layer's keys and values of every group, from the memory where they are there already."""
        new = batch.new_groups()
        if new:
            sizes = [len(group.features) for _, group in new]  # type: ignore[arg-type]
            key, value = cross_projections(attention, torch.cat([group.features for _, group in new]))  # type: ignore[misc]
            for (number, group), k, v in zip(new, key.split(sizes), value.split(sizes), strict=True):
                group.key, group.value = k.transpose(0, 1), v.transpose(0, 1)
                low, high = group.stored
                self._store(group, index, batch, number, query, group.key[:, low:high], group.value[:, low:high])
        for group in filter(None, batch.groups):
            if group.features is None:
                group.key, group.value = self.memory.segment_layer(group.segment, index)

    # ---- selection ------------------------------------------------------------------------------------------------------

    def _select(self, batch: _Batch, scores: list[Tensor] | None, recent: list[Tensor] | None = None) -> Tensor:
        """(B, N) or (B, KV, N) bool on the CPU, N = the most images × tiles × tokens: what stays."""
        images = max(1, *(len(s.request.images) for s in batch.sequences))
        length = images * self.max_tiles * self.tokens
        device = self.model.device
        valid = torch.zeros(len(batch.sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(batch.sequences):
            for i, encoded in enumerate(sequence.encoded):
                start = i * self.max_tiles * self.tokens
                valid[row, start : start + encoded.tiles * self.tokens] = True
        batch.valid = valid
        if not valid.any():
            return valid
        context = VisualContext(
            valid=valid.to(device),
            images=images,
            tiles=self.max_tiles,
            tokens=self.tokens,
            sample_ids=tuple(s.request.id for s in batch.sequences),
            kv_heads=self.geometry.kv_heads,
            attention=self._spread(batch, scores, length),
            recent=self._spread(batch, recent, length),
            class_attention=self._class_attention(batch, length),
        )
        if "features" in self.policy.looks_at:
            # One by one: all samples' features, padded to the longest, might not fit.
            decided = [self._decide_alone(batch, context, row) for row in range(len(valid))]
        else:
            decided = [self._decide(context)]
        keep = torch.cat([kept for kept, _ in decided])
        if self.policy.merges:
            batch.targets = [targets for _, several in decided if several is not None for targets in several]
        if self.rows == "transformers":
            # Rows before the image see padding tiles too, where nothing is trimmed.
            everything = (keep == (valid if keep.dim() == 2 else valid[:, None])).flatten(1).all(-1)
            keep = keep | everything.view(-1, *(1,) * (keep.dim() - 1))
        return keep

    def _decide(self, context: VisualContext) -> tuple[Tensor, Tensor | None]:
        """On the CPU: what stays, and where the rest goes if it is merged."""
        kept = self.policy.select(context)
        return kept.cpu(), self.policy.merge(kept, context).cpu() if self.policy.merges else None

    def _decide_alone(self, batch: _Batch, context: VisualContext, row: int) -> tuple[Tensor, Tensor | None]:
        """``_decide`` for one sequence, with its features; once for all questions about its images, where none is looked at."""
        images = tuple(image.key for image in batch.sequences[row].request.images)
        whose = (self.policy, images, context.valid.shape[1]) if self.policy.where == "features" else None
        if whose not in self._decided:
            decided = self._decide(self._with_features(batch, context, row))
            if whose is None:
                return decided
            self._decided[whose] = decided
            while len(self._decided) > DECISIONS:
                self._decided.popitem(last=False)
        return self._decided[whose]

    def _spread(self, batch: _Batch, packed: list[Tensor] | None, length: int) -> Tensor | None:
        """(B, H, N) of each sequence's (H, its features)."""
        if packed is None:
            return None
        device = self.model.device
        spread = torch.zeros(len(packed), self.geometry.heads, length, dtype=torch.float32, device=device)
        for row, (seen, positions) in enumerate(zip(packed, batch.positions, strict=True)):
            spread[row, :, positions.to(device)] = seen.to(device)
        return spread

    def _class_attention(self, batch: _Batch, length: int) -> Tensor | None:
        if "class_attention" not in self.policy.looks_at:
            return None
        device = self.model.device
        spread = torch.zeros(len(batch.sequences), length, dtype=torch.float32, device=device)
        for row, sequence in enumerate(batch.sequences):
            for i, encoded in enumerate(sequence.encoded):
                assert encoded.class_attention is not None
                start = i * self.max_tiles * self.tokens
                spread[row, start : start + len(encoded.class_attention)] = encoded.class_attention.to(device)
        return spread

    def _with_features(self, batch: _Batch, context: VisualContext, row: int) -> VisualContext:
        """The context of one sequence alone, with its features."""
        shape = (1, context.valid.shape[1], self.text.config.hidden_size)
        features = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        if batch.sequences[row].encoded:
            features[0, batch.positions[row].to(features.device)] = batch.packed(row).to(features.device)

        def own(each: Tensor | None) -> Tensor | None:
            return None if each is None else each[row : row + 1]

        return replace(
            context,
            valid=context.valid[row : row + 1],
            sample_ids=context.sample_ids[row : row + 1],
            attention=own(context.attention),
            recent=own(context.recent),
            class_attention=own(context.class_attention),
            features=features,
        )


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
        self.targets: list[Tensor] = []
        """(N,) long of each sequence: the kept position that each dropped one is merged into, -1 for none."""
        self.held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sequences]
        """Where each layer keeps a set of its own: each sequence's keys and values, layer by layer, until all are known."""
        self.counts: list[list[int]] = [[] for _ in sequences]
        """How many features each of these layers has kept, of all images."""
        self.seen: Tensor | None = None
        """(B, N) bool: what any of these layers has kept so far."""
        self.looks: list[_Look] = []
        self.ends: list[int] = []
        """Where each sequence's rows end, among the batch's rows that go through cross-attention layers."""
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
            self.ends.append(len(rows))
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

    def saw(self, keep: Tensor) -> None:
        """Takes a note of (B, N) bool that a layer keeps for itself."""
        self.seen = keep if self.seen is None else self.seen | keep

    def keep_layers(self) -> None:
        """Allocates and fills the segments of sequences of which each layer has kept a set of its own."""
        self.decided = True
        memory = self.prefill.memory
        full = False
        for sequence, layers in zip(self.sequences, self.held, strict=True):
            if not layers:
                continue
            rows, keys = [key.shape[1] for key, _ in layers], [key.shape[2] for key, _ in layers]
            widths = [value.shape[2] for _, value in layers]
            sequence.segment = segment = memory.allocate(rows, keys, widths)
            if segment is None:
                sequence.cross_need = memory.segment_elements_for(rows, keys, widths)
                full = True
                continue
            for index, layer in enumerate(layers):
                for stored, kept in zip(memory.segment_layer(segment, index), layer, strict=True):
                    stored.copy_(kept)
        if full:
            raise NoRoomError
        assert self.seen is not None
        for row, sequence in enumerate(self.sequences):
            sequence.trim = self._record(row, self.seen, self.prefill)

    def packed(self, number: int) -> Tensor:
        """(n, width): a sequence's features, as ``positions`` has them."""
        encoded = self.sequences[number].encoded
        return _joined([e.features for e in encoded], encoded, self.prefill.tokens)

    def merged(self, number: int, keep: Tensor) -> Tensor:
        """``packed`` with what is merged into the rows that ``keep`` (n,) bool keeps."""
        features, positions, targets = self.packed(number), self.positions[number], self.targets[number]
        # -1 stands behind everything else, and stays -1.
        places = torch.full((len(targets) + 1,), -1)
        places[positions] = torch.arange(len(positions))
        return merged(features, places[targets[positions]].to(features.device), keep.to(features.device))

    def _group(self, number: int, stored: tuple[int, int], mine: dict[Hashable, _Group]) -> _Group | None:
        """The sequence's group, its segment counted as used by it; None where there is no room."""
        memory, sequence, kept = self.prefill.memory, self.sequences[number], self.kept[number]
        share: Hashable = None
        policy = self.prefill.policy
        # What is merged, and which channels stay, may depend on the question.
        alike = not policy.slices and (not policy.merges or policy.where == "features")
        if stored == (0, len(kept)) and alike:
            which = None if len(kept) == self.features[number] else kept.numpy().tobytes()
            share = (tuple(image.key for image in sequence.request.images), which)
        segment = memory.find(share)
        if segment is not None:
            return mine.get(share) or _Group(None, stored, segment)
        layers, width = memory.geometry.cross_layers, memory.geometry.head_dim
        rows, keys, widths = [stored[1] - stored[0]] * layers, [policy.key_width(width)] * layers, [width] * layers
        segment = memory.allocate(rows, keys, widths, share)
        if segment is None:
            sequence.cross_need = memory.segment_elements_for(rows, keys, widths)
            return None
        features = self.packed(number)
        if policy.merges:
            features = self.merged(number, torch.zeros(len(features), dtype=torch.bool).index_fill(0, kept, True))
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
        rows = self.counts[row] or None
        width = prefill.policy.key_width(prefill.geometry.head_dim)
        return SampleTrim.of(valid, kept, self.lengths[row], prefill.geometry, itemsize, allocated, rows, width)


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
    for part in query.split(max(1, CHUNK_ELEMENTS // (heads * length))):
        # Scaled in fp32: rounding the logits a second time would move what is scored against what decoding attends to.
        weights = (fold(part, kv_heads) @ key.transpose(-1, -2)).float().mul_(scaling).softmax(-1)
        scores += weights.unflatten(1, (-1, len(part))).sum(2).flatten(0, 1)
        attended.append(unfold(weights.to(value.dtype) @ value, len(part)))
    return torch.cat(attended), scores
