"""The with-statement over transformers' Mllama: the one file of this package that touches the model's insides.

Written against ``transformers.models.mllama.modeling_mllama`` 5.23. While the context is open, every cross-attention module's
``forward`` is ours; hooks tell it of the prompt and of the rows that see an image. Leaving removes all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, MllamaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mllama.modeling_mllama import eager_attention_forward

from trimming.attention import summed_attention
from trimming.clustering import Clustering, merge_clusters
from trimming.costs import Geometry
from trimming.merging import first_members, follow, sums_by
from trimming.policies import Policy, VisualContext
from trimming.samples import SampleTrim
from trimming.selection import merged, merged_into, ragged_index
from trimming.tower import Encoding, Tower, TowerPolicy, TowerTiles
from trimming.tower.tower import looked_layer

Rows = Literal["meta", "transformers"]


@dataclass(slots=True)
class Trimmed:
    """What ``trim`` yields."""

    samples: list[SampleTrim] = field(default_factory=list)
    """One record a sample of the last prefill."""
    sample_ids: Sequence[str] | None = None
    """One id a sample of the next prefill, for policies that draw at random; None: the sample's place in the batch."""


@contextmanager
def trim(
    model: MllamaForConditionalGeneration,
    policy: Policy,
    rows: Rows = "meta",
    tower_tiles: TowerTiles = "all",
    tower_policy: TowerPolicy | None = None,
) -> Iterator[Trimmed]:
    """Trim every prefill of ``model`` inside the with-statement, in ``generate`` and in plain forwards.

    Later cross-attention layers project keys and values from the kept features alone, and the cache holds nothing else: its
    cross-attention layers have the length of the batch's longest kept set. Each prefill wants a fresh dynamic cache, and
    decoding from a cache must happen in the context that filled it.

    Args:
        model: restored when the context is left, also after an exception.
        policy: which features stay.
        rows: what rows before the image do, and rows without one. ``meta``: nothing comes to them from cross-attention
            layers, as the weights were trained. ``transformers``: as its code has it (issue 39379), such rows attend to every
            feature, padding tiles too, and only the MLP branch is masked; it is there to prove parity, and keeps padding
            tiles where it keeps every valid feature.
        tower_tiles: what becomes of padding tiles in the vision tower. ``all``: the model's own tower runs, unless a tower
            policy wants another.
        tower_policy: which rows of real tiles go on through the tower, layer by layer; None: all.

    Raises:
        TypeError: ``model`` is no Mllama, or ``policy`` no policy.
        ValueError: ``rows`` or ``tower_tiles`` is unknown, the tower leaves out what ``rows`` looks at, or the model is being
            trimmed already.
    """
    if not isinstance(model, MllamaForConditionalGeneration):
        raise TypeError(f"trim wants a MllamaForConditionalGeneration, not {type(model).__name__}")
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r} is not a trimming policy: give an instance, such as TrimmedLlama(k_ratio=0.25)")
    if rows not in ("meta", "transformers"):
        raise ValueError(f'rows={rows!r} is unknown: give "meta" or "transformers"')
    if tower_tiles not in get_args(TowerTiles):
        raise ValueError(f"tower_tiles={tower_tiles!r} is none of {get_args(TowerTiles)}")
    tower = Tower(model, _as_they_are, tower_tiles, tower_policy, keep_padding=rows == "transformers")
    surgery = _Surgery(model, policy, rows, tower)
    with ExitStack() as undo:
        surgery.open(undo)
        yield surgery.trimmed


@dataclass(frozen=True, slots=True)
class _Kept:
    """The features that one layer, or all, have kept of one prefill. N positions before, L after. G is 1, or the number of key
    heads where each keeps a set of its own."""

    index: Tensor
    """(B, G, L) long."""
    present: Tensor
    """(B, G, L) bool: False in the batch's padding."""
    ragged: bool
    bias: Tensor | None
    """(B, G, L) float32: what is added to their logits."""

    @classmethod
    def of(cls, keep: Tensor, sizes: Tensor | None = None) -> _Kept:
        """From (B, N) or (B, KV, N) bool; ``sizes`` (B, N) float32: how many features each of them stands for."""
        heads = keep[:, None] if keep.dim() == 2 else keep
        index, present = (t.unflatten(0, heads.shape[:2]) for t in ragged_index(heads.flatten(0, 1)))
        bias = None if sizes is None else sizes.log()[:, None].expand(-1, index.shape[1], -1).gather(-1, index)
        return cls(index, present, not bool(present.all()), bias)

    def gather(self, states: Tensor) -> Tensor:
        """(B, N, width) → (B, L, width), where all heads keep the same."""
        return states.gather(1, self.index[:, 0, :, None].to(states.device).expand(-1, -1, states.shape[-1]))

    def gather_heads(self, states: Tensor) -> Tensor:
        """(B, KV, N, D) → (B, KV, L, D)."""
        return states.gather(2, self.index[..., None].to(states.device).expand(-1, states.shape[1], -1, states.shape[-1]))

    def mask(self, full: Tensor | None, like: Tensor) -> Tensor | None:
        """(B, 1, Q, N) additive mask → (B, 1 or H, Q, L), padding shut out; ``like`` (B, H, Q, D) gives dtype and device."""
        if full is None and not self.ragged and self.bias is None:
            return None
        index, present = self.index.to(like.device)[:, :, None], self.present.to(like.device)[:, :, None]
        if full is None:
            trimmed = like.new_zeros(like.shape[0], index.shape[1], like.shape[2], index.shape[-1])
        else:
            heads = full.expand(-1, index.shape[1], -1, -1)
            trimmed = heads.gather(-1, index.expand(-1, -1, full.shape[2], -1))
        if self.bias is not None:
            trimmed = trimmed + self.bias.to(trimmed)[:, :, None]
        trimmed = trimmed.masked_fill(~present, torch.finfo(trimmed.dtype).min) if self.ragged else trimmed
        return trimmed if index.shape[1] == 1 else trimmed.repeat_interleave(like.shape[1] // index.shape[1], 1)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a cache holds of one cross-attention layer."""

    kept: _Kept
    channels: Tensor | None
    """(B, KV, d) long: the channels of its keys, where not all are there."""


@dataclass(slots=True)
class _Prefill:
    """What one prefill knows of itself, from the model's pre-hook to its end."""

    batch: int
    attention_mask: Tensor | None
    """(B, Q) bool of real prompt tokens, or None for all."""
    prompt_tokens: list[int]
    real: Tensor | None = None
    """(B, N) bool: features that some row sees."""
    valid: Tensor | None = None
    """(B, N) bool: those of them that there are, where some were merged."""
    firsts: Tensor | None = None
    """(B, N) long: the place of the feature that each was merged into before anything was chosen, −1 where it has left."""
    features: Tensor | None = None
    """(B, N, width): what there is to choose from; anything where nothing is."""
    sizes: Tensor | None = None
    """(B, N) float32: how many features each stands for; None where that does not count."""
    there: _Kept | None = None
    """``features`` that there are, where some were merged."""
    targets: Tensor | None = None
    """(B, N) long: see ``Policy.merge``."""
    keep: Tensor | None = None
    """(B, N) bool: what stays in any layer."""
    kept: _Kept | None = None
    """What all layers keep, or the last one where each keeps a set of its own."""
    states: Tensor | None = None
    """(B, L, width): the features that later layers project, gathered once."""
    counts: list[Tensor] = field(default_factory=list)
    """(B,) long of each layer that keeps a set of its own: how many."""
    class_attention: Tensor | None = None
    """See ``VisualContext``."""
    tiles: list[list[int]] | None = None
    """Of each sample's images, 0 for one that is missing; None where our own tower has not seen them."""


class _Picture(NamedTuple):
    key: str
    pixels: Tensor
    ratio_id: int


class _Surgery:
    def __init__(self, model: MllamaForConditionalGeneration, policy: Policy, rows: Rows, tower: Tower) -> None:
        self.model, self.policy, self.rows, self.tower = model, policy, rows, tower
        # Whether images go through it rather than through the model's own.
        self.own_tower = tower.tower_tiles != "all" or tower.policy is not None
        self.weighs = policy.weighs or tower.weighs
        self.trimmed = Trimmed()
        layers = model.model.language_model.layers
        self.cross_layers = [layers[i] for i in model.config.text_config.cross_attention_layers]
        self.forward_signature = inspect.signature(model.model.forward)
        self.prefill: _Prefill | None = None
        # Which caches this context has filled, and what they hold; a cache that dies takes its entry along.
        self.filled: WeakKeyDictionary[Cache, dict[int, _Layer]] = WeakKeyDictionary()
        # (B, images, tiles) of the images that the vision tower is at.
        self.tiles_there: Tensor | None = None
        # (B, 1, Q, 1): 1 where a row sees an image; set by each layer's pre-hook.
        self.row_mask: Tensor | None = None
        self.mask_before: Tensor | None = None
        self.mask_after: Tensor | None = None

    def open(self, undo: ExitStack) -> None:
        for layer in self.cross_layers:
            module = layer.cross_attn
            current = module.__dict__.get("forward")
            if isinstance(current, partial) and isinstance(getattr(current.func, "__self__", None), _Surgery):
                raise ValueError("the model is being trimmed already: leave the other trim(...) first")
            undo.callback(_put_back, module, current)
            module.forward = partial(self.cross_attention, module)
            handle = layer.register_forward_pre_hook(self.before_cross_layer, with_kwargs=True)
            undo.callback(handle.remove)
        vision = self.model.model.vision_model
        if self.own_tower:
            undo.callback(_put_back, vision, vision.__dict__.get("forward"))
            vision.forward = self.encode
        elif "class_attention" in self.policy.looks_at:
            undo.callback(vision.register_forward_pre_hook(self.before_vision, with_kwargs=True).remove)
            layers = [*vision.transformer.layers, *vision.global_transformer.layers]
            looked = layers[looked_layer(len(vision.transformer.layers), len(layers))]
            undo.callback(looked.register_forward_pre_hook(self.look_at_classes, with_kwargs=True).remove)
        undo.callback(self.model.model.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove)
        undo.callback(self.model.model.register_forward_hook(self.after_forward).remove)

    # ---- hooks ----------------------------------------------------------------------------------------------------------

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.forward_signature.bind_partial(*args, **kwargs).arguments
        cache = given.get("past_key_values")
        has_image = given.get("pixel_values") is not None or given.get("cross_attention_states") is not None
        if self.own_tower and given.get("cross_attention_states") is not None:
            raise ValueError("trim runs a tower of its own here: give pixel_values, not the cross_attention_states of another")
        fresh = cache is None or int(cache.get_seq_length()) == 0
        self.prefill = self.mask_before = None
        if not fresh:
            if has_image:
                raise ValueError("trim fills a cache once: an image that comes in a later turn needs a fresh cache")
            return
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        batch, length = tokens.shape[:2]
        mask = given.get("attention_mask")
        # Masks of other shapes come ready-made from the caller and do not tell padding.
        mask = mask[:, -length:].bool() if mask is not None and mask.dim() == 2 else None
        prompt_tokens = [length] * batch if mask is None else mask.sum(-1).tolist()
        self.prefill = _Prefill(batch, mask, prompt_tokens)

    def before_vision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.tiles_there = given["aspect_ratio_mask"]

    def look_at_classes(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sets the prefill's ``class_attention`` from what goes into the tower's last layer but one."""
        if self.prefill is None:
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        states, mask = given["hidden_states"], given.get("attention_mask")
        assert self.tiles_there is not None
        there = self.tiles_there.flatten(0, 1).bool()
        tiles, tokens = there.shape[1], self.model.model.vision_model.num_patches
        padded = states.shape[1] // tiles
        attention = module.self_attn
        heads = (attention.num_heads, attention.head_dim)
        with torch.no_grad():
            normed = module.input_layernorm(states)
            query = attention.q_proj(normed[:, ::padded]).unflatten(-1, heads).transpose(1, 2)
            key = attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
            logits = (query @ key.transpose(-1, -2)).float() * attention.scaling
            if mask is not None:
                logits = logits + mask[:, :, ::padded]
            weights = logits.softmax(-1).mean(1)
            # The mean over real tiles' class tokens, of real tiles' tokens.
            mean = (weights * there[..., None]).sum(1) / there.sum(-1, keepdim=True).clamp(min=1)
            looked = mean.unflatten(-1, (tiles, padded))[..., :tokens] * there[..., None]
        self.prefill.class_attention = looked.reshape(self.prefill.batch, -1)

    def before_cross_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.row_mask = kwargs.get("full_text_row_masked_out_mask")

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.prefill is not None:
            self.trimmed.samples = self.records(self.prefill)
        # Nothing of a prefill outlives it but what its cache needs.
        self.prefill = self.mask_before = self.mask_after = self.row_mask = None

    # ---- the tower ------------------------------------------------------------------------------------------------------

    def encode(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor, **kwargs: Any
    ) -> BaseModelOutput:
        """``MllamaVisionModel.forward`` by our tower: each row at the place of its first member, anything where none is."""
        batch, images, tiles = pixel_values.shape[:3]
        tokens, width = self.tower.tokens, self.model.config.vision_config.vision_output_dim
        weight = self.tower.vision.patch_embedding.weight
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        aspect_ratio_ids, aspect_ratio_mask = (t.to(weight.device) for t in (aspect_ratio_ids, aspect_ratio_mask))
        prefill = self.prefill
        ids = self.sample_ids(batch)
        states = pixel_values.new_zeros(batch * images, tiles * tokens, width)
        firsts = torch.arange(tiles * tokens, device=states.device).repeat(batch * images, 1)
        sizes = torch.ones(firsts.shape, device=states.device)
        looked = torch.zeros(firsts.shape, device=states.device)
        # An image that is missing has no arrangement, and no text that sees it.
        counts = (aspect_ratio_mask.sum(-1) * (aspect_ratio_ids > 0)).flatten()
        cut, arranged = pixel_values.flatten(0, 1), aspect_ratio_ids.flatten().tolist()
        for count in range(1, tiles + 1):
            own = (counts == count).nonzero()[:, 0]
            if not len(own):
                continue
            pictures = [_Picture(f"{ids[i // images]}/{i % images}", cut[i, :count], arranged[i]) for i in own.tolist()]
            seen = self.tower.see(pictures, look="class_attention" in self.policy.looks_at)
            self.spread(seen, own, count * tokens, states, firsts, sizes, looked)
        if prefill is not None:
            offset = torch.arange(images, device=firsts.device).repeat(batch)[:, None] * (tiles * tokens)
            prefill.firsts = (firsts + offset).masked_fill(firsts < 0, -1).view(batch, -1)
            prefill.sizes = sizes.view(batch, -1)
            if "class_attention" in self.policy.looks_at:
                prefill.class_attention = looked.view(batch, -1)
            prefill.tiles = counts.view(batch, images).tolist()
        return BaseModelOutput(last_hidden_state=states.view(batch, images, tiles, tokens, width))

    def spread(
        self, seen: Encoding, own: Tensor, real: int, states: Tensor, firsts: Tensor, sizes: Tensor, looked: Tensor
    ) -> None:
        """Puts what the tower says of images ``own`` where it belongs."""
        places = torch.arange(real, device=states.device).expand(len(own), -1)
        if seen.group is not None:
            assert seen.sizes is not None
            places = first_members(seen.group, seen.real)
            firsts[own, :real] = follow(seen.group, places)
            sizes[own[:, None], places] = seen.sizes
        states[own[:, None], places] = seen.features[:, : seen.real].to(states.dtype)
        if seen.class_attention is not None:
            looked[own[:, None], places] = seen.class_attention

    # ---- attention ------------------------------------------------------------------------------------------------------

    def cross_attention(
        self,
        module: Any,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``MllamaTextCrossAttention.forward`` over kept features; hidden_states is (B, Q, width)."""
        batch, length, _ = hidden_states.shape
        query = module.q_norm(
            module.q_proj(hidden_states).view(batch, length, module.num_heads, module.head_dim).transpose(1, 2)
        )
        if cross_attention_states is None:
            held = self.filled.get(past_key_values, {}).get(module.layer_idx)
            if held is None:
                raise ValueError("this cache was not filled inside this trim(...): run its prefill in the same context")
            layer = past_key_values.layers[module.layer_idx]  # type: ignore[union-attr]
            key, value, mask = layer.keys, layer.values, self.trimmed_mask(held.kept, attention_mask, query)
            if held.channels is not None:
                query = _sliced(query, held.channels)
        else:
            # They come as (B × images × tiles, tokens, width).
            states = cross_attention_states.reshape(batch, -1, cross_attention_states.shape[-1])
            key, value, mask = self.prefill_keys(module, query, states, past_key_values, attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        # Without a mask, sdpa would take the module for causal and cut the keys to the rows' length.
        kwargs["is_causal"] = False
        dropout = module.dropout if module.training else 0.0
        output, weights = attend(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, **kwargs)
        output = module.o_proj(output.reshape(batch, length, -1).contiguous())
        if self.rows == "meta" and self.row_mask is not None:
            output = output * self.row_mask[:, 0].to(output.device)
        return output, weights

    def prefill_keys(
        self, module: Any, query: Tensor, states: Tensor, cache: Cache | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values (B, KV, ·, D) and mask this layer's prefill attends with; fills the cache with the kept ones."""
        prefill = self.prefill
        assert prefill is not None
        rows = self.seeing_rows(prefill, query)
        first = module.layer_idx == self.cross_layers[0].layer_idx
        if first:
            self.begin(prefill, _valid_features(mask, rows, states), states)
            if self.policy.where == "features":
                self.decide(prefill, None, None)
        assert prefill.features is not None
        if self.policy.where != "each_layer" and not (first and self.policy.where == "first_layer"):
            assert prefill.kept is not None
            assert prefill.states is not None
            key, value = self.project(module, prefill.states)
            self.store(module, cache, prefill.kept, (query, rows, mask), key, value)
            return key, value, self.trimmed_mask(prefill.kept, mask, query)

        there, key, value = prefill.there, *self.project(module, prefill.features)
        # What all layers see, be it merged.
        seen_key, seen_value = (t if there is None else there.gather_heads(t) for t in (key, value))
        seen_mask = mask if there is None else there.mask(mask, query)
        with torch.no_grad():
            attention = self.looked_at(prefill, query, seen_key, seen_mask, rows, module.scaling)
            recent = None
            if "recent" in self.policy.looks_at:
                last = rows & (rows.flip(-1).cumsum(-1).flip(-1) <= self.policy.recent_rows)
                recent = self.looked_at(prefill, query, seen_key, seen_mask, last, module.scaling)
            self.decide(prefill, attention, recent)
        assert prefill.kept is not None
        if self.policy.merges:
            assert prefill.states is not None
            kept_key, kept_value = self.project(module, prefill.states)
        else:
            kept_key, kept_value = prefill.kept.gather_heads(key), prefill.kept.gather_heads(value)
        self.store(module, cache, prefill.kept, (query, rows, mask), kept_key, kept_value)
        return seen_key, seen_value, seen_mask

    def looked_at(
        self, prefill: _Prefill, query: Tensor, key: Tensor, mask: Tensor | None, rows: Tensor, scaling: float
    ) -> Tensor:
        """(B, H, N) float32: attention summed over ``rows``, 0 where no feature is."""
        summed = summed_attention(query, key, mask, rows, scaling)
        there = prefill.there
        if there is None:
            return summed
        assert prefill.valid is not None
        index, present = there.index.to(summed.device), there.present.to(summed.device)
        spread = summed.new_zeros(*summed.shape[:2], prefill.valid.shape[1])
        # The batch's padding is added to the first place, as nothing.
        return spread.scatter_add_(-1, index.expand(-1, summed.shape[1], -1), summed * present)

    def begin(self, prefill: _Prefill, real: Tensor, states: Tensor) -> None:
        """What there is to choose from: the features (B, N, width) of ``real`` tiles, or what they have been merged into."""
        size = self.tower.max_tiles * self.tower.tokens
        if prefill.tiles is not None:
            # Our tower has made nothing of padding tiles, whatever the mask says.
            counts = torch.tensor(prefill.tiles, device=real.device)[..., None] * self.tower.tokens
            real = real & (torch.arange(size, device=real.device) < counts).flatten(1)
        prefill.real, prefill.features = real, states
        whole = torch.arange(real.shape[1], device=real.device).expand_as(real)
        firsts = whole if prefill.firsts is None else prefill.firsts.to(real.device)
        if self.policy.clustering is None and prefill.firsts is None and not self.weighs:
            prefill.valid = real
            return
        sizes = torch.ones(real.shape, device=states.device) if prefill.sizes is None else prefill.sizes.to(states.device)
        prefill.firsts, prefill.sizes, prefill.valid = firsts, sizes, real & (firsts == whole)
        if self.policy.clustering is not None:
            self.cluster(prefill, self.policy.clustering)
        # The model's own tower leaves padding too, which is there where nothing of its image was merged.
        alone = (prefill.valid == real).unflatten(1, (-1, size)).all(-1).repeat_interleave(size, 1)
        there = prefill.valid | (~real & alone & (prefill.tiles is None))
        prefill.there = None if bool(there.all()) else _Kept.of(there, prefill.sizes.to(there.device) if self.weighs else None)
        prefill.sizes = prefill.sizes if self.weighs else None

    def cluster(self, prefill: _Prefill, clustering: Clustering) -> None:
        """Merges each image's features, as the engine does once it has encoded them."""
        valid, states, sizes, firsts = prefill.valid, prefill.features, prefill.sizes, prefill.firsts
        assert valid is not None
        assert states is not None
        assert sizes is not None
        assert firsts is not None
        size = self.tower.max_tiles * self.tower.tokens
        states, sizes, looked = states.clone(), sizes.clone(), prefill.class_attention
        # Where a feature's cluster begins.
        begins = torch.arange(valid.shape[1], device=valid.device).repeat(len(valid), 1)
        for row in range(len(valid)):
            for start in range(0, valid.shape[1], size):
                places = valid[row, start : start + size].nonzero()[:, 0] + start
                if not len(places):
                    continue
                own, counted = (t[row, places.to(t.device)][None] for t in (states, sizes))
                (found,) = merge_clusters(own, clustering(own), counted)
                left = places[found.places.to(places.device)]
                if len(left) == len(places):
                    continue
                states[row, left.to(states.device)] = found.features
                sizes[row, left.to(sizes.device)] = found.sizes
                begins[row, places] = left[found.cluster.to(places.device)]
                if looked is not None:
                    mine = looked[row, places.to(looked.device)][None, :, None]
                    looked[row, left.to(looked.device)] = sums_by(mine, found.cluster.to(mine.device)[None], len(left))[0, :, 0]
        whole = torch.arange(valid.shape[1], device=valid.device)
        prefill.features, prefill.sizes, prefill.valid = states, sizes, valid & (begins == whole)
        prefill.firsts = follow(firsts, begins)

    def decide(self, prefill: _Prefill, attention: Tensor | None, recent: Tensor | None) -> None:
        real, valid, states, sizes = prefill.real, prefill.valid, prefill.features, prefill.sizes
        assert real is not None
        assert valid is not None
        assert states is not None
        tokens = self.model.model.vision_model.num_patches
        tiles = self.model.config.vision_config.max_num_tiles

        def here(looked_at: Tensor | None) -> Tensor | None:
            # Layers may be on several devices, and the vision tower on another.
            return None if looked_at is None else looked_at.to(valid.device)

        context = VisualContext(
            valid=valid,
            images=valid.shape[1] // (tiles * tokens),
            tiles=tiles,
            tokens=tokens,
            sample_ids=self.sample_ids(prefill.batch),
            kv_heads=self.cross_layers[0].cross_attn.num_key_value_heads,
            attention=here(attention),
            recent=here(recent),
            features=here(states) if "features" in self.policy.looks_at else None,
            class_attention=here(prefill.class_attention),
        )
        keep = self.policy.select(context)
        if self.policy.merges:
            prefill.targets = self.policy.merge(keep, context)
            counted = torch.ones_like(valid, dtype=torch.float32) if sizes is None else sizes
            each = zip(states, *(t.to(states.device) for t in (counted, prefill.targets, keep)), strict=True)
            rows, counts = zip(*(merged(*own) for own in each), strict=True)
            # A policy whose means count once leaves what the tower, or clusters, had counted before.
            states, sizes = torch.stack(rows), torch.stack(counts) if self.policy.weighs else sizes
        if self.rows == "transformers":
            everything = (keep == (real if keep.dim() == 2 else real[:, None])).flatten(1).all(-1)
            keep = keep | everything.view(-1, *(1,) * (keep.dim() - 1))
        prefill.kept = _Kept.of(keep, None if sizes is None else sizes.to(keep.device))
        if self.policy.where != "each_layer" or self.policy.merges:
            prefill.states = prefill.kept.gather(states)
        if self.policy.where == "each_layer":
            stayed = keep & (valid if keep.dim() == 2 else valid[:, None])
            prefill.counts.append(stayed.flatten(1).sum(-1) // (1 if keep.dim() == 2 else keep.shape[1]))
            # The next layer decides anew, and so does its mask.
            self.mask_before = None
        now = keep if keep.dim() == 2 else keep.any(1)
        prefill.keep = now if prefill.keep is None else prefill.keep | now

    def project(self, module: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, KV, L, D) of features (B, L, width)."""
        states = states.to(module.k_proj.weight.device)
        shape = (states.shape[0], -1, module.num_key_value_heads, module.head_dim)
        key = module.k_norm(module.k_proj(states).view(shape).transpose(1, 2))
        return key, module.v_proj(states).view(shape).transpose(1, 2)

    def store(
        self,
        module: Any,
        cache: Cache | None,
        kept: _Kept,
        asked: tuple[Tensor, Tensor, Tensor | None],
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Fills the cache with a layer's kept keys and values (B, KV, L, D). ``asked``: queries, rows that see an image, and
        the mask."""
        if cache is None:
            return
        channels = None
        if self.policy.slices:
            with torch.no_grad():
                channels = torch.stack([self.channels_of(kept, sample, *asked, key) for sample in range(len(key))])
            key = key.gather(-1, channels[:, :, None].expand(-1, -1, key.shape[2], -1))
        self.filled.setdefault(cache, {})[module.layer_idx] = _Layer(kept, channels)
        stored = cache.update(key, value, module.layer_idx)
        if stored[0].shape[2] != key.shape[2]:
            raise ValueError(
                f"a {type(cache).__name__} keeps {stored[0].shape[2]} places for {key.shape[2]} kept features: "
                "trim needs a dynamic cache, which is generate's default"
            )

    def channels_of(self, kept: _Kept, sample: int, query: Tensor, rows: Tensor, mask: Tensor | None, key: Tensor) -> Tensor:
        """(KV, d) long of one sample, by the keys that decoding will see and the rows that see these: the last image's."""
        heads, asking = key.shape[1], rows[sample].to(query.device)
        present, index = (t[sample].to(key.device).expand(heads, -1) for t in (kept.present, kept.index))
        own = key[sample]
        if kept.bias is not None:
            # A sum over keys of their squares counts what each stands for.
            own = own * (kept.bias[sample].to(key.device) / 2).exp()[..., None].to(key.dtype)
        if not asking.any():
            return torch.arange(self.policy.key_width(key.shape[-1]), device=key.device).expand(heads, -1)
        if mask is not None:
            sees = mask[sample, 0] == 0
            visible = sees[asking.nonzero()[-1, 0]]
            asking, present = asking & (sees == visible).all(-1), present & visible[index]
        queries = query[sample][:, asking].unflatten(0, (heads, -1)).flatten(1, 2)
        return self.policy.channels(queries, own[present].view(heads, -1, key.shape[-1]))

    def trimmed_mask(self, kept: _Kept, full: Tensor | None, query: Tensor) -> Tensor | None:
        """``kept.mask``, worked out once a forward rather than once a layer, where layers keep the same."""
        if full is None or full is not self.mask_before or self.policy.where == "each_layer":
            self.mask_before, self.mask_after = full, kept.mask(full, query)
        return self.mask_after

    def seeing_rows(self, prefill: _Prefill, query: Tensor) -> Tensor:
        """(B, Q) bool: text rows that see an image and are no padding (right padding comes after the image and "sees" it)."""
        rows = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        if self.row_mask is not None:
            rows = rows & (self.row_mask[:, 0, :, 0] > 0).to(query.device)
        return rows if prefill.attention_mask is None else rows & prefill.attention_mask.to(query.device)

    # ---- records --------------------------------------------------------------------------------------------------------

    def sample_ids(self, batch: int) -> tuple[str, ...]:
        ids = self.trimmed.sample_ids
        if ids is None:
            return tuple(map(str, range(batch)))
        # generate repeats every sample for beams and for several answers.
        if not ids or batch % len(ids):
            raise ValueError(f"sample_ids holds {len(ids)} ids for a batch of {batch}: give one a sample")
        return tuple(i for i in ids for _ in range(batch // len(ids)))

    def records(self, prefill: _Prefill) -> list[SampleTrim]:
        geometry = Geometry.of(self.model.config)
        itemsize = self.cross_layers[0].cross_attn.k_norm.weight.element_size()
        none = torch.zeros(prefill.batch, 0, dtype=torch.bool)
        real = none if prefill.real is None else prefill.real.cpu()
        keep = none if prefill.keep is None else prefill.keep.cpu()
        allocated = 0 if prefill.kept is None else prefill.kept.index.shape[-1] * geometry.cross_kv_bytes(itemsize)
        counts = [[int(count[row]) for count in prefill.counts] or None for row in range(prefill.batch)]
        width = self.policy.key_width(geometry.head_dim)
        biases = (geometry.cross_layers if self.policy.where == "each_layer" else 1) if self.weighs else 0
        into = [None] * prefill.batch if prefill.real is None else self.merged_into(prefill)
        return [
            SampleTrim.of(
                real[row],
                keep[row],
                prompt,
                geometry,
                itemsize,
                allocated,
                counts[row],
                width,
                biases,
                into[row],
                self.tower.keep_fraction([n for n in prefill.tiles[row] if n]) if prefill.tiles else 1.0,
            )
            for row, prompt in enumerate(prefill.prompt_tokens)
        ]

    def merged_into(self, prefill: _Prefill) -> Sequence[Tensor | None]:
        """See ``SampleTrim.merged_into``."""
        real, keep, firsts, targets = prefill.real, prefill.keep, prefill.firsts, prefill.targets
        assert real is not None
        assert keep is not None
        if self.policy.where == "each_layer":
            # What layers merge each for themselves has no one target.
            targets = None
        found: list[Tensor | None] = []
        for row, own in enumerate(real):
            places = own.nonzero()[:, 0]
            into = places if firsts is None else firsts[row, places]
            # An image whose every feature stayed has not been merged.
            clustered = not into.equal(places)
            if not clustered and targets is None:
                found.append(None)
                continue
            found.append(merged_into(own.cpu(), into.cpu(), keep[row].cpu(), None if targets is None else targets[row].cpu()))
        return found


def _as_they_are(pixels: Tensor) -> Tensor:
    return pixels


def _valid_features(mask: Tensor | None, rows: Tensor, states: Tensor) -> Tensor:
    """(B, N) bool: features that some seeing row attends to. mask (B, 1, Q, N) additive, rows (B, Q) bool."""
    if mask is None:
        return rows.any(-1, keepdim=True).expand(-1, states.shape[1])
    return ((mask[:, 0] == 0) & rows[..., None].to(mask.device)).any(1)


def _sliced(query: Tensor, channels: Tensor) -> Tensor:
    """(B, H, Q, d) of queries (B, H, Q, D), of each key head the channels (B, KV, d) that its keys have left."""
    heads = channels.repeat_interleave(query.shape[1] // channels.shape[1], 1)
    return query.gather(-1, heads[:, :, None].expand(-1, -1, query.shape[2], -1))


def _put_back(module: nn.Module, forward: Any) -> None:
    """Undo an instance's ``forward``; accelerate's hooks put theirs there too, so what was there returns."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
