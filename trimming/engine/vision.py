"""The vision tower without masks: images of one tile count at a time, exactly what the masked tower computes.

In transformers' tower every image is padded to the most tiles an image may have, and every tile to a multiple of eight tokens;
its mask forbids padding to attend to padding, and nothing else. So real tokens attend to all tokens and padding to real tokens
alone, which is two attention calls without a mask once real tokens come first: no (4 × 1608)² mask of 83 MB an image, and
flash kernels apply. Order does not matter to attention, as positions are in the tokens themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from trimming.clustering import Clustering, merge_clusters, sum_of_runs
from trimming.engine.request import Image
from trimming.engine.sequence import Encoded, Members

TowerTiles = Literal["all", "real"]


class Tower:
    """Vision tower and projector.

    Args:
        model: where the weights are.
        normalise: from uint8 (n, 3, side, side) tiles to the model's pixels, in its dtype and on its device.
        tower_tiles: ``real`` leaves padding tiles out of the tower. An approximation: real tokens have learnt to attend to
            them too.
        keep_padding: also return padding tiles' features, which rows before the image see under transformers' rows.
    """

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        normalise: Callable[[Tensor], Tensor],
        tower_tiles: TowerTiles = "all",
        keep_padding: bool = False,
    ) -> None:
        if tower_tiles == "real" and keep_padding:
            raise ValueError(
                'tower_tiles="real" leaves out the padding tiles that rows="transformers" looks at: use rows="meta"'
            )
        self.vision: Any = model.model.vision_model
        self.projector: Any = model.model.multi_modal_projector
        self.normalise, self.tower_tiles, self.keep_padding = normalise, tower_tiles, keep_padding
        self.tokens: int = self.vision.num_patches
        self.max_tiles: int = self.vision.max_num_tiles
        self.max_ratio_id: int = model.config.vision_config.max_aspect_ratio_id

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Projected features (B, tiles × tokens, text width) of ``images``, which share one tile count.

        Their real tiles' features, tile by tile; with ``keep_padding`` the padding tiles' after them.
        """
        return self._encode(images, look=False)[0]

    def look(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """``encode``, and ``VisualContext.class_attention`` (B, real tiles × tokens) float32."""
        features, attention = self._encode(images, look=True)
        assert attention is not None
        return features, attention

    def _encode(self, images: Sequence[Image], look: bool) -> tuple[Tensor, Tensor | None]:
        vision, tokens = self.vision, self.tokens
        count = len(images[0].pixels)
        tiles = count if self.tower_tiles == "real" else self.max_tiles
        real = count * tokens
        kept = tiles * tokens if self.keep_padding else real

        ids = torch.tensor([image.ratio_id for image in images], device=vision.class_embedding.device)
        states = self._embed(torch.cat([image.pixels for image in images]), ids, count, tiles)
        # Each tile's rows up to a multiple of eight tokens: zeros, behind everything else.
        fill = tiles * (-tokens % 8)
        states = F.pad(states.flatten(1, 2), (0, 0, 0, fill))

        layers = vision.transformer.layers
        wanted = vision.intermediate_layers_indices
        between = {}
        for index, layer in enumerate(layers):
            states = _layer(layer, states, real, states.shape[1])
            if index in wanted:
                between[index] = states[:, :kept]
        states = vision.layernorm_post(states)
        after = self._tile_embedding(vision.post_tile_positional_embedding, ids, tiles)
        states = states + torch.cat([after.repeat_interleave(tokens, 1), after.repeat_interleave(-tokens % 8, 1)], 1)
        attention = None
        last = len(vision.global_transformer.layers) - 1
        for index, layer in enumerate(vision.global_transformer.layers):
            if look and index == max(0, last - 1):
                attention = _class_attention(layer, states, real, tokens)
            # Nothing looks at the last layer's padding.
            states = _layer(layer, states, real, kept if index == last else states.shape[1])
        # The intermediate layers' channels are interleaved.
        mixed = torch.stack([between[index] for index in wanted], -1).flatten(-2)
        projected: Tensor = self.projector(torch.cat([states[:, :kept], mixed], -1))
        return projected, attention

    def _embed(self, pixels: Tensor, ids: Tensor, count: int, tiles: int) -> Tensor:
        """(B, tiles, tokens, width). A padding tile's pixels are zero, and the patch embedding has no bias."""
        vision = self.vision
        patches = _patches(vision.patch_embedding, self.normalise(pixels))
        patches = F.pad(patches.unflatten(0, (-1, count)), (0, 0, 0, 0, 0, tiles - count))
        patches = patches + self._tile_embedding(vision.pre_tile_positional_embedding, ids, tiles)[:, :, None]
        first = vision.class_embedding.expand(*patches.shape[:2], 1, -1)
        states = torch.cat([first, patches], 2)
        position = vision.gated_positional_embedding
        gate = position.gate.tanh()
        states = states + (1 - gate) * position.embedding
        grown = position.tile_embedding(ids).view(len(ids), self.max_tiles, self.tokens, -1)[:, :tiles]
        embedded: Tensor = vision.layernorm_pre(states + gate * grown)
        return embedded

    def _tile_embedding(self, module: Any, ids: Tensor, tiles: int) -> Tensor:
        """(B, tiles, width)."""
        embedding = module.embedding(ids).view(len(ids), self.max_tiles, -1)[:, :tiles]
        return embedding * module.gate.tanh() if module.is_gated else embedding


def _patches(convolution: Any, pixels: Tensor) -> Tensor:
    """(n, patches, width) of pixels (n, 3, side, side). The convolution's windows do not overlap and it has no bias, so that it
    is a matrix product; as one it needs no plan of cuDNN's for each number of tiles, and is no exception in fp32, where torch
    multiplies in full precision and convolves in TF32."""
    size = convolution.kernel_size[0]
    rows = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return F.linear(rows, convolution.weight.flatten(1))


def _layer(layer: Any, states: Tensor, real: int, rows: int) -> Tensor:
    """One layer's first ``rows`` rows from all of ``states`` (B, N, width), the first ``real`` of which are no padding."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    heads = (attention.num_heads, attention.head_dim)
    query = attention.q_proj(normed[:, :rows]).unflatten(-1, heads).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
    value = attention.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
    attended = F.scaled_dot_product_attention(query[:, :, :real], key, value, scale=attention.scaling).transpose(1, 2)
    if rows > real:
        blind = F.scaled_dot_product_attention(
            query[:, :, real:], key[:, :, :real], value[:, :, :real], scale=attention.scaling
        )
        attended = torch.cat([attended, blind.transpose(1, 2)], 1)
    attended = attention.o_proj(attended.flatten(2))
    states = states[:, :rows]
    states = states + (layer.gate_attn.tanh() * attended if layer.is_gated else attended)
    forward = layer.mlp(layer.post_attention_layernorm(states))
    return states + (layer.gate_ffn.tanh() * forward if layer.is_gated else forward)


def _class_attention(layer: Any, states: Tensor, real: int, tokens: int) -> Tensor:
    """(B, real) float32: the class tokens' attention in this layer to each real token, mean over heads and class tokens."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    heads = (attention.num_heads, attention.head_dim)
    query = attention.q_proj(normed[:, :real:tokens]).unflatten(-1, heads).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
    weights = (query @ key.transpose(-1, -2) * attention.scaling).softmax(-1, dtype=torch.float32)
    return weights[..., :real].mean((1, 2))


def encoded_images(
    tiles: int, tokens: int, features: Tensor, class_attention: Tensor | None, clustering: Clustering | None
) -> list[Encoded]:
    """What the engine holds of images that have ``tiles`` real tiles of ``tokens`` each.

    Args:
        features: (B, n, width), the real tiles' first.
        class_attention: (B, real tiles × tokens) float32, where the policy looks at it.
        clustering: by what real tiles' features are merged; padding never joins. What is merged has no padding any more.
    """
    real = features[:, : tiles * tokens]
    looked = [None] * len(features) if class_attention is None else list(class_attention)
    merged = [] if clustering is None else merge_clusters(real, clustering(real))
    if all(len(one.places) == real.shape[1] for one in merged):
        each = zip(features, looked, strict=True)
        return [Encoded(tiles, _own(whole), None if attention is None else _own(attention)) for whole, attention in each]
    # In one piece to the CPU, behind the counts, for which all have waited anyhow.
    told = torch.cat([t for one in merged for t in (one.sizes.long(), one.places, one.cluster)]).cpu()
    parts = iter(told.split([len(t) for one in merged for t in (one.sizes, one.places, one.cluster)]))
    encoded = []
    for whole, attention, one in zip(features, looked, merged, strict=True):
        sizes, places, cluster = next(parts), next(parts), next(parts)
        alone = len(places) == real.shape[1]
        if attention is not None:
            attention = sum_of_runs(attention[one.cluster.argsort(stable=True)], one.sizes.long())
        members = None if alone else Members(sizes.float(), places, cluster)
        encoded.append(Encoded(tiles, _own(whole if alone else one.features), attention, members))
    return encoded


def _own(part: Tensor) -> Tensor:
    """A copy of what is part of more: it would keep all of a batch's images."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


class ImageCache:
    """Images by key, the longest unused dropped first. A prompt that waits for its prefill holds on to its images by itself."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._images: OrderedDict[tuple[str, Clustering | None], Encoded] = OrderedDict()

    def get(self, key: str, clustering: Clustering | None = None) -> Encoded | None:
        """The image, its features merged like this, or all there."""
        if (key, clustering) in self._images:
            self._images.move_to_end((key, clustering))
        return self._images.get((key, clustering))

    def put(self, key: str, image: Encoded, clustering: Clustering | None = None) -> None:
        self._images[key, clustering] = image
        size = sum(image.bytes for image in self._images.values())
        while self._images and size > self.limit_bytes:
            size -= self._images.popitem(last=False)[1].bytes

    def __len__(self) -> int:
        return len(self._images)

    def clear(self) -> None:
        self._images.clear()
