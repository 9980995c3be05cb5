"""Prefill: several prompts at once, packed one behind the other, so that nothing is computed for padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
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
from trimming.engine.sequence import Decision, Group, Sequence_, packed_positions
from trimming.engine.sharded import ShardedMemory
from trimming.engine.stages import stages
from trimming.mllama import Rows
from trimming.policies import Policy, VisualContext
from trimming.samples import SampleTrim
from trimming.selection import merged, merged_into
from trimming.tower import Tower

DECISIONS = 1024
"""Images, or rows of images, of which it is remembered what stays."""


class NoRoomError(Exception):
    """The memory has no room for what some sequences keep; their ``cross_need`` says how much. Nothing is left allocated."""


@dataclass(slots=True, eq=False)
class _Set:
    """What a group keeps of its images, for those of its sequences that this prefill has. N = images × most tiles × tokens."""

    group: Group
    positions: Tensor
    """(n,) long: where its packed features lie on the axis of N."""
    real: Tensor
    """(N,) bool: real tiles' features."""
    valid: Tensor
    """(N,) bool: those of them that there are, where some were merged."""
    sizes: Tensor | None
    """(n,) float32: how many features each packed one stands for; None where that does not count."""
    ends: list[int]
    """Where each image's real tiles end among the packed features, from 0 on."""
    decision: Decision
    known: bool
    """Whether an earlier prefill has decided."""
    numbers: list[int] = field(default_factory=list)
    """Its sequences, by their places in the batch."""
    seeing: list[tuple[int, int]] = field(default_factory=list)
    """Of each of them the rows that see what decoding will see; see ``_Look.rows``."""
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Where all layers keep the same: its places among the packed features."""
    stored: tuple[int, int] = (0, 0)
    """Which of ``kept`` decoding sees."""
    merged: Tensor | None = None
    """``packed``, with what is merged into those that are kept."""
    bias: Tensor | None = None
    """(kept,) float32, what is added to their logits."""
    segment: Segment | None = None
    fresh: bool = True
    """Whether this prefill fills the segment; a running sequence has done it otherwise."""
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    """(KV, n, D) of the present layer, of what is kept."""
    value: Tensor = field(default_factory=lambda: torch.empty(0))
    held: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """Where each layer keeps a set of its own: keys, values and biases, layer by layer, until all are known."""
    counts: list[int] = field(default_factory=list)
    """How many features each of these layers has kept, of all images."""

    @property
    def packed(self) -> Tensor:
        """(n, width): its features, as ``positions`` has them."""
        return self.joined([e.features for e in self.group.encoded])

    @property
    def clustered(self) -> bytes | None:
        """What tells its features from those of the same images encoded at another time; None where none were merged. A device
        may compute otherwise in another batch, and who is alike by a hair then is not."""
        merged_here = any(image.members is not None for image in self.group.encoded)
        return self.positions.numpy().tobytes() if merged_here else None

    @property
    def full_bias(self) -> Tensor | None:
        """(n,) float32: what is added to the logits of its packed features."""
        return None if self.sizes is None else self.sizes.log()

    @property
    def last(self) -> tuple[int, int]:
        """Which packed features decoding may see: those of the last image, or of the last adjacent ones."""
        first, last = self.group.last_images
        return self.ends[first], self.ends[last]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor an image, along its tokens, as one: every image's real tiles, then every image's padding tiles."""
        if len(parts) == 1:
            return parts[0]
        real = [b - a for a, b in pairwise(self.ends)]
        return torch.cat(
            [*(p[:n] for p, n in zip(parts, real, strict=True)), *(p[n:] for p, n in zip(parts, real, strict=True))]
        )


@dataclass(slots=True, eq=False)
class _Projection:
    """Features whose keys and values are computed once a layer: of one set, or of all sets of the same images."""

    features: Tensor
    """(m, width)."""
    places: list[tuple[_Set, Tensor | None]]
    """The sets, and which of ``features`` each keeps; None for all."""


@dataclass(slots=True, eq=False)
class _Look:
    """Text rows of one group that see the same features, of its sequences one behind the other."""

    set: _Set
    rows: tuple[int, int]
    """Among the batch's rows that go through cross-attention layers."""
    features: tuple[int, int]
    """Among the set's packed features."""
    counts: bool
    """Whether these rows see an image, rather than everything as rows before it do under transformers' rows."""
    kept: tuple[int, int] = (0, 0)
    """``features``, among those it keeps."""


Scores = dict[_Set, Tensor]
"""(H, n) float32 of each set's packed features."""


class Prefill:
    """Runs prompts through the language model and leaves their keys and values in ``memory``.

    Args:
        model: where the weights are.
        policy: which visual features stay.
        rows: see ``trimming.trim``.
        memory: sequences come with a slot there; their segments are allocated here.
        rotary: the model's.
        tower: what encodes the sequences' images.
    """

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        policy: Policy,
        rows: Rows,
        memory: Memory | ShardedMemory,
        rotary: Rotary,
        tower: Tower,
    ) -> None:
        self.model, self.policy, self.rows, self.memory, self.rotary = model, policy, rows, memory, rotary
        self.tower = tower
        self.text: Any = model.model.language_model
        self.geometry: Geometry = memory.geometry
        self.tokens: int = model.model.vision_model.num_patches
        self.max_tiles: int = model.config.vision_config.max_num_tiles
        self.is_cross = crosses(model)
        self.stages = stages(model)
        # What was decided by images alone, the oldest dropped first.
        self._decided: OrderedDict[Hashable, tuple[Tensor, Tensor | None]] = OrderedDict()

    @property
    def weighs(self) -> bool:
        """Whether what stands for several features counts as often: see ``Policy.weighs``."""
        return self.tower.weighs or self.policy.weighs

    def __call__(self, sequences: Sequence[Sequence_]) -> Tensor:
        """Logits (B, V) of the token after each prompt. Sets each sequence's ``segment`` and ``trim``.

        A group that has not decided yet decides here, by those of its sequences that are there: all of them should be. Raises
        ``NoRoomError``.
        """
        batch = _Batch(self, sequences, stores=True)
        try:
            logits = self._run(batch)
        except BaseException:
            for sequence in sequences:
                if sequence.segment is not None:
                    self.memory.release(sequence.segment)
                    sequence.segment = None
            raise
        batch.conclude()
        return logits

    def decide(self, sequences: Sequence[Sequence_], at_once: int) -> None:
        """Lets a group decide whose sequences, all of which these are, can't be prefilled at once; nothing is stored.

        ``at_once`` of them look at a time. Raises ``ValueError`` for fewer than all under a policy that slices, which wants to
        see all of their queries.
        """
        if at_once < len(sequences) and self.policy.slices:
            raise ValueError(f"{self.policy} looks at all queries of a group at once")
        seen: list[tuple[Scores, Scores]] = []
        for start in range(0, len(sequences), at_once):
            part = sequences[start : start + at_once]
            batch = _Batch(self, part, stores=False, seen=seen, decides=start + at_once >= len(sequences))
            self._run(batch)
        batch.conclude()

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
                    if not batch.stores and self._has_seen(batch):
                        return states
        if self.is_cross[-1]:
            states = states[last]
        logits: Tensor = self.model.lm_head(norm(self.text.norm, states))
        return logits

    def _has_seen(self, batch: _Batch) -> bool:
        """Whether nothing in later layers matters to what is decided."""
        layers = self.geometry.cross_layers if self.policy.where == "each_layer" or self.policy.slices else 1
        return batch.looked == layers

    # ---- self-attention -------------------------------------------------------------------------------------------------

    def _self_layer(
        self, layer: Any, index: int, batch: _Batch, states: Tensor, rotary: tuple[Tensor, Tensor], only: Tensor | None
    ) -> Tensor:
        """The layer's output, of all rows or of the sequences' last ones, which are ``only``."""
        normed = norm(layer.input_layernorm, states)
        key, value = self_projections(layer.self_attn, normed, *rotary)
        asking, lengths = (slice(None), batch.lengths) if only is None else (only, [1] * len(batch.lengths))
        query = self_queries(layer.self_attn, normed[asking], *(t[asking] for t in rotary))
        attended = []
        split = zip(query.split(lengths), key.split(batch.lengths), value.split(batch.lengths), strict=True)
        for sequence, (q, k, v) in zip(batch.sequences, split, strict=True):
            if batch.stores:
                keys, values = self.memory.slot_layer(index)
                keys[sequence.slot, :, : len(k)] = k.transpose(0, 1)
                values[sequence.slot, :, : len(v)] = v.transpose(0, 1)
            attended.append(self_attend(q, k, v, layer.self_attn.scaling, causal=only is None))
        states = states[asking] + layer.self_attn.o_proj(torch.cat(attended))
        return states + mlp(layer.mlp, norm(layer.post_attention_layernorm, states))

    # ---- cross-attention ------------------------------------------------------------------------------------------------

    def _cross_layer(self, layer: Any, index: int, batch: _Batch, states: Tensor) -> None:
        """Adds the layer to the rows of ``states`` that go through it, in place."""
        attention = layer.cross_attn
        batch.looked += 1
        rows = states[batch.rows]
        query = cross_queries(attention, norm(layer.input_layernorm, rows))
        if self.policy.where == "each_layer" or (index == 0 and self.policy.where == "first_layer"):
            attended = self._full_layer(attention, index, batch, query)
        else:
            if index == 0:
                self._select(batch, {}, {})
                batch.keep()
            self._project(attention, index, batch, query)
            attended = query.new_empty(len(query), attention.num_heads * attention.head_dim)
            for look in batch.looks:
                (a, b), (c, d) = look.rows, look.kept
                key, value, bias = look.set.key[:, c:d], look.set.value[:, c:d], _part(look.set.bias, c, d)
                attended[a:b] = attend(query[a:b], key, value, attention.scaling, bias)
        rows = rows + layer.cross_attn_attn_gate.tanh() * attention.o_proj(attended)
        forward = mlp(layer.mlp, norm(layer.post_attention_layernorm, rows))
        if batch.blind is not None:
            forward[batch.blind] = 0
        states[batch.rows] = rows + layer.cross_attn_mlp_gate.tanh() * forward

    def _full_layer(self, attention: Any, index: int, batch: _Batch, query: Tensor) -> Tensor:
        """Attends to every feature, scores them on the way, decides, and stores what stays."""
        keys = self._full_keys(attention, batch)
        scores = self._nothing_seen(batch, query)
        attended = query.new_empty(len(query), attention.num_heads * attention.head_dim)
        for look in batch.looks:
            (a, b), (c, d), (key, value, bias) = look.rows, look.features, keys[look.set]
            seen_keys = key[:, c:d], value[:, c:d], attention.scaling, _part(bias, c, d)
            if look.counts and look.set in scores:
                attended[a:b], seen = _attend_and_score(query[a:b], *seen_keys)
                scores[look.set][:, c:d] += seen
            else:
                attended[a:b] = attend(query[a:b], *seen_keys)
        scores, recent = batch.add_up(index, scores, self._recent(attention, batch, query, keys))
        if not batch.decides:
            return attended
        self._select(batch, scores, recent)
        if self.policy.where == "each_layer":
            for s in batch.sets:
                self._hold(attention, index, batch, query, s, *keys[s])
            if index == self.geometry.cross_layers - 1:
                batch.keep_layers()
            return attended
        batch.keep()
        if self.policy.merges:
            self._project(attention, index, batch, query)
            return attended
        for s in batch.sets:
            low, high = s.stored
            key, value, _ = keys[s]
            kept = s.kept[low:high].to(key.device)
            self._store(s, index, query, key[:, kept], value[:, kept])
        return attended

    def _nothing_seen(self, batch: _Batch, query: Tensor) -> Scores:
        """Zeros for each set that has yet to decide, on ``query``'s device."""
        return {s: query.new_zeros(self.geometry.heads, len(s.positions), dtype=torch.float32) for s in batch.undecided}

    def _recent(
        self, attention: Any, batch: _Batch, query: Tensor, keys: dict[_Set, tuple[Tensor, Tensor, Tensor | None]]
    ) -> Scores:
        """Probabilities of the last rows of each prompt alone, summed, where the policy looks at them."""
        if "recent" not in self.policy.looks_at:
            return {}
        recent = self._nothing_seen(batch, query)
        for s, found in recent.items():
            for features, rows in batch.last_rows(s, self.policy.recent_rows).items():
                (c, d), (key, value, bias) = features, keys[s]
                asking = torch.cat([query[a:b] for a, b in rows])
                seen = key[:, c:d], value[:, c:d], attention.scaling, _part(bias, c, d)
                found[:, c:d] += _attend_and_score(asking, *seen)[1]
        return recent

    def _full_keys(self, attention: Any, batch: _Batch) -> dict[_Set, tuple[Tensor, Tensor, Tensor | None]]:
        """Each set's keys and values (KV, n, D) of all of its images' features, an image's computed once, and their biases."""
        images = list({id(e): e for s in batch.sets for e in s.group.encoded}.values())
        key, value = cross_projections(attention, torch.cat([e.features for e in images]).to(batch.rows.device))
        sizes = [len(e.features) for e in images]
        found = {id(e): own for e, *own in zip(images, key.split(sizes), value.split(sizes), strict=True)}
        keys = {}
        for s in batch.sets:
            parts = [found[id(e)] for e in s.group.encoded]
            key, value = (s.joined(list(each)).transpose(0, 1) for each in zip(*parts, strict=True))
            bias = s.full_bias
            keys[s] = key, value, None if bias is None else bias.to(key.device)
        return keys

    def _hold(
        self,
        attention: Any,
        index: int,
        batch: _Batch,
        query: Tensor,
        s: _Set,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Takes what this layer keeps for itself of a set's keys and values (KV, n, D), and of the biases (n,)."""
        keep = s.decision.keeps[index]
        packed = keep[..., s.positions]
        # Padding tiles, which transformers' rows keep where nothing is trimmed, are not counted.
        stayed = packed & s.valid[s.positions]
        s.counts.append(int(stayed.sum()) // (len(key) if packed.dim() == 2 else 1))
        if not (batch.stores or self.policy.slices):
            return
        packed = packed.to(key.device)
        packed[..., : s.last[0]] = packed[..., s.last[1] :] = False
        key, value, bias = self._kept(attention, index, s, packed, key, value, bias)
        key = self._slice(s, index, query, key, bias)
        if batch.stores:
            s.held.append((key, value, bias))

    def _kept(
        self, attention: Any, index: int, s: _Set, keep: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a set's keys and values (KV, n, D), and of its biases (n,), what ``keep``, (n,) or (KV, n) bool, leaves of them:
        of biases as many dimensions as it has."""
        if keep.dim() == 2:
            # As many in each head, each head its own.
            places = keep.nonzero()[:, 1].view(len(keep), -1)
            key, value = (t.gather(1, places[..., None].expand(-1, -1, t.shape[-1])) for t in (key, value))
            return key, value, None if bias is None else bias[places]
        places = keep.nonzero()[:, 0]
        if not self.policy.merges:
            return key[:, places], value[:, places], None if bias is None else bias[places]
        features, sizes = _merged(s, index, keep)
        features = features[places.to(features.device)].to(key.device)
        key, value = cross_projections(attention, features)
        if bias is not None:
            bias = (sizes.log().to(places.device) if self.policy.weighs else bias)[places]
        return key.transpose(0, 1), value.transpose(0, 1), bias

    def _slice(self, s: _Set, index: int, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """``key`` (KV, n, D) with the channels that the policy leaves."""
        if not self.policy.slices:
            return key
        decided = s.decision.channels
        if len(decided) == index:
            asking = torch.cat([query[a:b] for a, b in s.seeing])
            # A sum over keys of their squares counts what each stands for.
            counted = key if bias is None else key * (bias / 2).exp()[..., None].to(key.dtype)
            decided.append(self.policy.channels(fold(asking, len(key)), counted))
        return key.gather(-1, decided[index][:, None].expand(-1, key.shape[1], -1))

    def _store(self, s: _Set, index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes what decoding sees of a set (KV, n, D) into its segment, where that is this prefill's to fill."""
        key = self._slice(s, index, query, key, _part(s.bias, *s.stored))
        if s.segment is not None and s.fresh:
            stored = self.memory.segment_layer(s.segment, index)
            stored[0].copy_(key)
            stored[1].copy_(value)

    def _project(self, attention: Any, index: int, batch: _Batch, query: Tensor) -> None:
        """This layer's keys and values of every set, from the memory where they are there already."""
        if batch.projections:
            sizes = [len(projection.features) for projection in batch.projections]
            key, value = cross_projections(attention, torch.cat([p.features for p in batch.projections]))
            for projection, k, v in zip(batch.projections, key.split(sizes), value.split(sizes), strict=True):
                for s, places in projection.places:
                    own = (k, v) if places is None else (k[places], v[places])
                    s.key, s.value = (t.transpose(0, 1) for t in own)
                    low, high = s.stored
                    self._store(s, index, query, s.key[:, low:high], s.value[:, low:high])
        for s in batch.there:
            assert s.segment is not None
            s.key, s.value = self.memory.segment_layer(s.segment, index)

    # ---- selection ------------------------------------------------------------------------------------------------------

    def _select(self, batch: _Batch, scores: Scores, recent: Scores) -> None:
        """Has every set decide that has not, by scores where the policy looks at attention."""
        sets = batch.undecided
        if not sets:
            return
        images = max(len(s.group.images) for s in sets)
        length = images * self.max_tiles * self.tokens
        valid = torch.zeros(len(sets), length, dtype=torch.bool)
        for row, s in zip(valid, sets, strict=True):
            row[: len(s.valid)] = s.valid
        context = VisualContext(
            valid=valid.to(self.model.device),
            images=images,
            tiles=self.max_tiles,
            tokens=self.tokens,
            sample_ids=tuple(s.group.id for s in sets),
            kv_heads=self.geometry.kv_heads,
            attention=self._spread(scores, length),
            recent=self._spread(recent, length),
            class_attention=self._class_attention(sets, length),
        )
        if "features" in self.policy.looks_at:
            # One by one: all samples' features, padded to the longest, might not fit.
            decided = [self._decide_alone(s, context, row) for row, s in enumerate(sets)]
        else:
            decided = [self._decide(context)]
        keep = torch.cat([kept for kept, _ in decided])
        if self.rows == "transformers":
            # Rows before the image see padding tiles too, where nothing is trimmed.
            real = torch.zeros_like(valid)
            for row, s in zip(real, sets, strict=True):
                row[: len(s.real)] = s.real
            everything = (keep == (real if keep.dim() == 2 else real[:, None])).flatten(1).all(-1)
            keep = keep | everything.view(-1, *(1,) * (keep.dim() - 1))
        for s, own in zip(sets, keep, strict=True):
            # Other sets of the batch may have more images.
            s.decision.keeps.append(own[..., : len(s.valid)].clone())
        targets = [each for _, several in decided if several is not None for each in several]
        for s, each in zip(sets, targets, strict=bool(targets)):
            s.decision.targets.append(each[: len(s.valid)].clone())

    def _decide(self, context: VisualContext) -> tuple[Tensor, Tensor | None]:
        """On the CPU: what stays, and where the rest goes if it is merged."""
        kept = self.policy.select(context)
        return kept.cpu(), self.policy.merge(kept, context).cpu() if self.policy.merges else None

    def _decide_alone(self, s: _Set, context: VisualContext, row: int) -> tuple[Tensor, Tensor | None]:
        """``_decide`` for one set, with its features; once for all questions about its images, where none is looked at."""
        whose = None
        if self.policy.where == "features":
            whose = (self.policy, s.group.keys, s.clustered, context.valid.shape[1])
        if whose not in self._decided:
            decided = self._decide(self._with_features(s, context, row))
            if whose is None:
                return decided
            self._decided[whose] = decided
            while len(self._decided) > DECISIONS:
                self._decided.popitem(last=False)
        return self._decided[whose]

    def _spread(self, packed: Scores, length: int) -> Tensor | None:
        """(B, H, N) of each set's (H, its features)."""
        if not packed:
            return None
        device = self.model.device
        spread = torch.zeros(len(packed), self.geometry.heads, length, dtype=torch.float32, device=device)
        for row, (s, seen) in enumerate(packed.items()):
            spread[row, :, s.positions.to(device)] = seen.to(device)
        return spread

    def _class_attention(self, sets: Sequence[_Set], length: int) -> Tensor | None:
        if "class_attention" not in self.policy.looks_at:
            return None
        device = self.model.device
        spread = torch.zeros(len(sets), length, dtype=torch.float32, device=device)
        for row, s in enumerate(sets):
            for i, encoded in enumerate(s.group.encoded):
                assert encoded.class_attention is not None
                own = s.positions[s.ends[i] : s.ends[i + 1]].to(device)
                spread[row, own] = encoded.class_attention.to(device)
        return spread

    def _with_features(self, s: _Set, context: VisualContext, row: int) -> VisualContext:
        """The context of one set alone, with its features."""
        shape = (1, context.valid.shape[1], self.text.config.hidden_size)
        features = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        features[0, s.positions.to(features.device)] = s.packed.to(features.device)

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
    """The rows and features of one prefill, and what is decided about them.

    Args:
        stores: whether keys and values are stored, or only decided what would be.
        seen: by layer, what earlier parts of the group have looked at, and recently; this one's is added.
        decides: whether it does, or a later part.
    """

    def __init__(
        self,
        prefill: Prefill,
        sequences: Sequence[Sequence_],
        stores: bool,
        seen: list[tuple[Scores, Scores]] | None = None,
        decides: bool = True,
    ) -> None:
        self.prefill, self.sequences, self.stores = prefill, sequences, stores
        self.seen, self.decides = seen, decides
        self.looked = 0
        """Cross-attention layers that it has been through."""
        self.lengths = [len(s.request.tokens) for s in sequences]
        by_group: dict[Group, _Set] = {}
        self.looks: list[_Look] = []
        self.ends: list[int] = []
        """Where each sequence's rows end, among the batch's rows that go through cross-attention layers."""
        self.projections: list[_Projection] = []
        self.there: list[_Set] = []
        """Sets of which all that prefill and decoding see lies in the memory."""
        self._parts: dict[_Set, list[tuple[int, tuple[int, int], tuple[int, int]]]] = {}
        """By set: each sequence's number, rows and the features that they see, of rows that see an image."""
        padding = prefill.rows == "transformers"
        blind: list[int] = []
        rows: list[int] = []
        start = 0
        for number, sequence in enumerate(sequences):
            if sequence.spans:
                if sequence.group not in by_group:
                    by_group[sequence.group] = self._set(sequence.group)
                s = by_group[sequence.group]
                s.numbers.append(number)
                before = sequence.spans[0].rows[0]
                if padding and before:
                    self._look(s, (len(rows), len(rows) + before), (0, len(s.positions)), False)
                    blind += range(len(rows), len(rows) + before)
                    rows += range(start, start + before)
                for span in sequence.spans:
                    (a, b), (c, d) = span.rows, span.images
                    here, features = (len(rows), len(rows) + b - a), (s.ends[c], s.ends[d])
                    self._look(s, here, features, True)
                    self._parts.setdefault(s, []).append((number, here, features))
                    rows += range(start + a, start + b)
                s.seeing.append(here)
            start += self.lengths[number]
            self.ends.append(len(rows))
        self.sets = list(by_group.values())
        device = prefill.model.device
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.blind = torch.tensor(blind, device=device) if blind else None

    def _set(self, group: Group) -> _Set:
        prefill = self.prefill
        images, tokens, most = group.encoded, prefill.tokens, prefill.max_tiles
        ends = [0, *accumulate(image.real(tokens) for image in images)]
        positions = packed_positions(images, tokens, most, prefill.rows == "transformers")
        real = (torch.arange(most * tokens) < torch.tensor([image.tiles * tokens for image in images])[:, None]).flatten()
        valid = torch.zeros_like(real).index_fill_(0, positions[: ends[-1]], True)
        sizes = None
        if prefill.weighs:
            own = [torch.ones(image.real(tokens)) if image.members is None else image.members.sizes for image in images]
            # Padding tiles' features, behind all others, stand for themselves.
            sizes = torch.cat([*own, torch.ones(len(positions) - ends[-1])])
        made = _Set(group, positions, real, valid, sizes, ends, group.decision or Decision(), group.decision is not None)
        if made.known and made.decision.clustered != made.clustered:
            # Decided over other features.
            made.decision, made.known = Decision(), False
        made.decision.clustered = made.clustered
        return made

    def _look(self, s: _Set, rows: tuple[int, int], features: tuple[int, int], counts: bool) -> None:
        """Adds a look, to the one before where that sees the same: one product for all questions about an image."""
        last = self.looks[-1] if self.looks else None
        if last and (last.set, last.features, last.counts, last.rows[1]) == (s, features, counts, rows[0]):
            last.rows = (last.rows[0], rows[1])
        else:
            self.looks.append(_Look(s, rows, features, counts))

    @property
    def undecided(self) -> list[_Set]:
        return [s for s in self.sets if not s.known]

    def last_rows(self, s: _Set, count: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """The last ``count`` rows of each of a set's prompts, by the features that they see."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, (a, b), features in self._parts[s]:
            first = max(a, self.ends[number] - count)
            if first < b:
                found.setdefault(features, []).append((first, b))
        return found

    def add_up(self, index: int, scores: Scores, recent: Scores) -> tuple[Scores, Scores]:
        """What the group's rows look at in a layer, those of earlier parts included."""
        if self.seen is None:
            return scores, recent
        if len(self.seen) == index:
            self.seen.append((scores, recent))
            return scores, recent
        # A part's only set is its group's.
        totals = []
        for before, now in zip(self.seen[index], (scores, recent), strict=True):
            totals.append({s: own + sum(before.values()) for s, own in now.items()})
        self.seen[index] = (totals[0], totals[1])
        return totals[0], totals[1]

    def move(self, device: torch.device) -> None:
        """Takes what the next layers need to their device."""
        self.rows = self.rows.to(device)
        self.blind = None if self.blind is None else self.blind.to(device)
        for projection in self.projections:
            projection.features = projection.features.to(device)
            projection.places = [(s, None if p is None else p.to(device)) for s, p in projection.places]
        for s in self.sets:
            s.bias = None if s.bias is None else s.bias.to(device)

    def keep(self) -> None:
        """Once all sets are decided, for all layers alike: allocates their segments, and tells what is to be projected."""
        for s in self.sets:
            s.kept = s.decision.keeps[0][s.positions].nonzero()[:, 0]
            s.stored = self._among_kept(s, s.last)
        for look in self.looks:
            look.kept = self._among_kept(look.set, look.features)
        geometry, policy = self.prefill.geometry, self.prefill.policy
        width, layers = geometry.head_dim, geometry.cross_layers
        # What is merged, and which channels stay, may depend on the question.
        alike = not policy.slices and (not policy.merges or policy.where == "features")
        widths = [policy.key_width(width)] * layers, [width] * layers
        for s in self.sets if self.stores else ():
            whole = alike and s.stored == (0, len(s.kept))
            which = None if len(s.kept) == len(s.positions) else s.kept.numpy().tobytes()
            share = (s.group.keys, s.clustered, which) if whole else None
            placed = self._place(s, [s.stored[1] - s.stored[0]] * layers, *widths, int(self.prefill.weighs), share)
            if placed and whole and not s.fresh:
                self.there.append(s)
        self._check_room()
        for s in self.sets:
            self._settle(s)
        self._plan_projections()

    def _settle(self, s: _Set) -> None:
        """Merges what the policy merges of a set's features, and tells what is added to the logits of those that are kept."""
        if s in self.there:
            assert s.segment is not None
            # The same in every head.
            held = s.segment.biases[0]
            s.bias = None if held is None else held[0]
            return
        sizes = s.sizes
        if self.prefill.policy.merges:
            kept = torch.zeros(len(s.positions), dtype=torch.bool).index_fill(0, s.kept, True)
            s.merged, counts = _merged(s, 0, kept)
            # A policy whose means count once leaves what the tower, or clusters, had counted before.
            sizes = counts if self.prefill.policy.weighs else sizes
        if sizes is not None:
            s.bias = sizes[s.kept.to(sizes.device)].log().to(self.rows.device)
            if s.segment is not None and s.fresh:
                low, high = s.stored
                for bias in s.segment.distinct_biases:
                    bias.copy_(s.bias[low:high].to(bias.device))

    def keep_layers(self) -> None:
        """Allocates and fills the segments of sets of which each layer has kept a set of its own."""
        for s in self.sets if self.stores else ():
            rows, keys = [key.shape[1] for key, *_ in s.held], [key.shape[2] for key, *_ in s.held]
            biases = len(rows) if self.prefill.weighs else 0
            if self._place(s, rows, keys, [value.shape[2] for _, value, _ in s.held], biases) and s.fresh:
                assert s.segment is not None
                for index, (*layer, bias) in enumerate(s.held):
                    for stored, kept in zip(self.prefill.memory.segment_layer(s.segment, index), layer, strict=True):
                        stored.copy_(kept)
                    held = s.segment.biases[index]
                    if held is not None and bias is not None:
                        held.copy_(bias)
        self._check_room()

    def _place(
        self,
        s: _Set,
        rows: Sequence[int],
        keys: Sequence[int],
        values: Sequence[int],
        biases: int,
        share: Hashable | None = None,
    ) -> bool:
        """Gives the set's sequences their segment, a live one that holds the same if there is; False where there is no room.

        ``share``: what is the same for other groups that keep the same; by default the group's own, if it has several members.
        """
        memory = self.prefill.memory
        share = share or ((s.group, s.clustered) if s.group.size > 1 else None)
        segment = memory.find(share)
        s.fresh = segment is None
        segment = segment or memory.allocate(rows, keys, values, share, biases)
        if segment is None:
            s.group.cross_need = memory.segment_elements_for(rows, keys, values, biases)
            return False
        segment.users += len(s.numbers) - 1
        s.segment = segment
        for number in s.numbers:
            self.sequences[number].segment = segment
        return True

    def _check_room(self) -> None:
        if self.stores and any(s.segment is None for s in self.sets):
            raise NoRoomError

    def _plan_projections(self) -> None:
        """One projection for all sets of the same images: of the features that any of them keeps, which never are more than
        those of all of them one by one."""
        device, merges = self.rows.device, self.prefill.policy.merges
        together: dict[Hashable, list[_Set]] = {}
        for s in self.sets:
            if s not in self.there:
                # What was merged into a feature is its set's own.
                together.setdefault(s if merges else tuple(map(id, s.group.encoded)), []).append(s)
        for sets in together.values():
            kept = sets[0].kept if len(sets) == 1 else torch.cat([s.kept for s in sets]).unique()
            features = sets[0].packed if sets[0].merged is None else sets[0].merged
            features = features if len(kept) == len(features) else features[kept.to(features.device)]
            same = [len(s.kept) == len(kept) for s in sets]
            places = [
                (s, None if all_of_it else torch.searchsorted(kept, s.kept).to(device))
                for s, all_of_it in zip(sets, same, strict=True)
            ]
            self.projections.append(_Projection(features.to(device), places))

    def _among_kept(self, s: _Set, features: tuple[int, int]) -> tuple[int, int]:
        low, high = torch.searchsorted(s.kept, torch.tensor(features)).tolist()
        return low, high

    def conclude(self) -> None:
        """Once all has gone well: groups of several remember what they decided, and sequences have their records."""
        for s in self.sets:
            if s.group.size > 1:
                s.group.decision = s.decision
        if not self.stores:
            return
        none = torch.zeros(0, dtype=torch.bool)
        for number, length in enumerate(self.lengths):
            self.sequences[number].trim = self._record(none, none, length, None)
        for s in self.sets:
            keep = torch.stack([each if each.dim() == 1 else each.any(0) for each in s.decision.keeps]).any(0)
            record = self._record(s.real, keep, 0, s)
            for number in s.numbers:
                own = self.lengths[number] * self.prefill.geometry.self_kv_bytes(self.prefill.memory.itemsize)
                self.sequences[number].trim = replace(record, self_kv_bytes=own)
                self.sequences[number].channels = s.decision.channels

    def _record(self, real: Tensor, keep: Tensor, length: int, s: _Set | None) -> SampleTrim:
        geometry, itemsize = self.prefill.geometry, self.prefill.memory.itemsize
        allocated = s.segment.size * itemsize if s and s.segment else 0
        policy = self.prefill.policy
        width = policy.key_width(geometry.head_dim)
        biases = 0
        if self.prefill.weighs:
            biases = geometry.cross_layers if policy.where == "each_layer" else 1
        counts = s.counts or None if s else None
        into = self._merged_into(s, keep) if s else None
        tower = self.prefill.tower.keep_fraction([image.tiles for image in s.group.encoded]) if s else None
        return SampleTrim.of(real, keep, length, geometry, itemsize, allocated, counts, width, biases, into, tower)

    def _merged_into(self, s: _Set, keep: Tensor) -> Tensor | None:
        """See ``SampleTrim.merged_into``; ``keep`` (N,) bool."""
        policy, size = self.prefill.policy, self.prefill.max_tiles * self.prefill.tokens
        # What layers merge each for themselves has no one target.
        chosen = policy.merges and policy.where != "each_layer"
        if not (chosen or s.clustered):
            return None
        targets = s.decision.targets[0] if chosen else None
        firsts = []
        for i, image in enumerate(s.group.encoded):
            own = torch.arange(image.tiles * self.prefill.tokens)
            if image.members is not None:
                cluster = image.members.cluster
                own = torch.where(cluster >= 0, image.members.places[cluster.clamp(min=0)], -1)
            firsts.append(torch.where(own >= 0, own + i * size, -1))
        return merged_into(s.real, torch.cat(firsts), keep, targets)


def _part(bias: Tensor | None, first: int, end: int) -> Tensor | None:
    return None if bias is None else bias[first:end]


def _merged(s: _Set, index: int, keep: Tensor) -> tuple[Tensor, Tensor]:
    """A set's packed features and sizes with what is merged into the rows that ``keep`` (n,) bool keeps, by its ``index``-th
    decision."""
    features, targets = s.packed, s.decision.targets[index]
    sizes = torch.ones(len(features)) if s.sizes is None else s.sizes
    # -1 stands behind everything else, and stays -1.
    places = torch.full((len(targets) + 1,), -1)
    places[s.positions] = torch.arange(len(s.positions))
    into = places[targets[s.positions]]
    return merged(features, *(t.to(features.device) for t in (sizes, into, keep)))


def _attend_and_score(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``attend``, and each head's probabilities summed over the rows: (heads, L) float32.

    One pass: the probabilities are needed either way. Rows come in chunks, so that no map of a long prompt is ever whole.
    """
    kv_heads, length = key.shape[:2]
    heads = query.shape[1]
    scores = query.new_zeros(heads, length, dtype=torch.float32)
    attended = []
    for part in query.split(max(1, CHUNK_ELEMENTS // (heads * length))):
        # Scaled in fp32: rounding the logits a second time would move what is scored against what decoding attends to.
        logits = (fold(part, kv_heads) @ key.transpose(-1, -2)).float().mul_(scaling)
        weights = (logits if bias is None else logits.add_(bias)).softmax(-1)
        scores += weights.unflatten(1, (-1, len(part))).sum(2).flatten(0, 1)
        attended.append(unfold(weights.to(value.dtype) @ value, len(part)))
    return torch.cat(attended), scores
