"""The vision tower without masks: images of one tile count at a time, exactly what the masked tower computes, or less of it.

In transformers' tower every image is padded to the most tiles an image may have, and every tile to a multiple of eight tokens;
its mask forbids padding to attend to padding, and nothing else. So real tokens attend to all tokens and padding to real tokens
alone, which is two attention calls without a mask once real tokens come first: no (4 × 1608)² mask of 83 MB an image, and
flash kernels apply. Order does not matter to attention, as positions are in the tokens themselves.

What makes it cheaper is one mechanism: a row may stand for several, and counts as often in every attention. Padding is pooled
into few such rows before the first layer (``trimming.tower.padding``), rows of real tiles merge on the way
(``trimming.tower.policy``), and what is left is clustered behind it (``trimming.clustering``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from trimming.merging import sums_by
from trimming.tower.layer import Seen, run_layer
from trimming.tower.padding import padding_of
from trimming.tower.policy import TowerPolicy
from trimming.tower.rows import Mark, Rows

TowerTiles = Literal["pooled", "all", "real"]
"""What becomes of padding tiles: a few rows stand for each, with which 99 % of the demo models' texts are the same to the
letter; or all of them go through the tower, as it was trained; or none does, which shows."""


class Picture(Protocol):
    """An image as the tower takes it: see ``trimming.engine.Image``."""

    @property
    def key(self) -> str: ...
    @property
    def pixels(self) -> Tensor: ...
    @property
    def ratio_id(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """What tower and projector make of B images of one tile count."""

    features: Tensor
    """(B, n, text width): the real tiles', tile by tile, or what is left of them, in the order of first members; where padding
    is kept, the padding tiles' after them."""
    real: int
    """How many of ``features`` are of real tiles."""
    class_attention: Tensor | None = None
    """(B, real) float32, where asked for: see ``VisualContext.class_attention``."""
    group: Tensor | None = None
    """(B, real tiles × tokens) long: which of ``features`` stands for each, −1 for none; None where each stands for itself."""
    sizes: Tensor | None = None
    """(B, real) float32: how many each stands for in attention, where ``group`` is; 1 if the tower policy does not weigh."""


class Tower:
    """Vision tower and projector.

    Args:
        model: where the weights are.
        normalise: from (n, 3, side, side) tiles to the model's pixels, in its dtype and on its device.
        tower_tiles: see ``TowerTiles``.
        policy: which rows of real tiles go on, layer by layer; None: all.
        keep_padding: also return padding tiles' features, which rows before the image see under transformers' rows. They are
            there only where ``tower_tiles`` is ``all`` and no policy lets any row go.

    Raises:
        TypeError: ``policy`` is none.
        ValueError: there are no such ``tower_tiles``, padding can't be kept, or the policy's share can't be reached.
    """

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        normalise: Callable[[Tensor], Tensor],
        tower_tiles: TowerTiles = "pooled",
        policy: TowerPolicy | None = None,
        keep_padding: bool = False,
    ) -> None:
        policy = given_policy(policy)
        if tower_tiles not in get_args(TowerTiles):
            raise ValueError(f"tower_tiles={tower_tiles!r} is none of {', '.join(get_args(TowerTiles))}")
        _check_padding(tower_tiles, policy, keep_padding)
        self._model = model
        self.vision: Any = model.model.vision_model
        self.projector: Any = model.model.multi_modal_projector
        self.normalise, self.tower_tiles, self.keep_padding = normalise, tower_tiles, keep_padding
        self.policy = policy
        self.tokens: int = self.vision.num_patches
        self.max_tiles: int = self.vision.max_num_tiles
        self.max_ratio_id: int = model.config.vision_config.max_aspect_ratio_id
        self._layers = [*self.vision.transformer.layers, *self.vision.global_transformer.layers]
        self._local = len(self.vision.transformer.layers)
        # Counted from the end where negative.
        self._intermediate = [range(self._local)[index] for index in self.vision.intermediate_layers_indices]
        # A share that can't be reached is refused now.
        for tiles in range(1, self.max_tiles + 1):
            self.plan(tiles)

    def under(self, policy: TowerPolicy | None) -> Tower:
        """The same tower under another policy."""
        return Tower(self._model, self.normalise, self.tower_tiles, policy, self.keep_padding)

    def plan(self, tiles: int) -> tuple[int, ...]:
        """Rows of the real tiles that enter each layer, and that are left behind the last one."""
        return tower_plan(self.policy, tiles, self.tokens, self._local, len(self._layers) - self._local)

    def keep_fraction(self, tiles: Sequence[int]) -> float:
        """Share of rows × layers that is left of images of so many tiles each, taken together."""
        plans = [self.plan(count) for count in tiles]
        return 1.0 if not plans else sum(sum(plan[:-1]) for plan in plans) / sum(plan[0] * (len(plan) - 1) for plan in plans)

    @property
    def weighs(self) -> bool:
        """Whether what stands for several counts as often: see ``TowerPolicy.weighs``."""
        return self.policy is not None and self.policy.weighs

    def encode(self, images: Sequence[Picture]) -> Encoding:
        """Projected features of ``images``, which share one tile count."""
        return self._projected(self.see(images, look=False))

    def look(self, images: Sequence[Picture]) -> Encoding:
        """``encode``, with the class tokens' attention."""
        return self._projected(self.see(images, look=True))

    def _projected(self, seen: Encoding) -> Encoding:
        return replace(seen, features=self.projector(seen.features))

    def see(self, images: Sequence[Picture], look: bool) -> Encoding:
        """What the projector is given of ``images``; with ``look`` the class tokens' attention too."""
        vision, tokens, policy = self.vision, self.tokens, self.policy
        count, device = len(images[0].pixels), vision.class_embedding.device
        tiles = count if self.tower_tiles == "real" else self.max_tiles
        ids = torch.tensor([image.ratio_id for image in images], device=device)
        embedded = self._embed(torch.cat([image.pixels for image in images]), ids, count, tiles)
        padding = padding_of(count, tiles, tokens, self.tower_tiles == "pooled")
        rows = Rows(embedded, count, padding, self.weighs)

        plan, last = self.plan(count), len(self._layers) - 1
        looked = looked_layer(self._local, len(self._layers)) if look else -1
        # Padding tiles' rows; their fill is behind them.
        kept = (tiles - count) * tokens if self.keep_padding else 0
        marks: dict[int, Mark] = {}
        class_attention = None
        for index, layer in enumerate(self._layers):
            if index == self._local:
                self._end_local_layers(rows, ids, tiles)
            leaving = policy if plan[index + 1] < plan[index] else None
            wants = frozenset() if leaving is None else leaving.looks_at
            seen = Seen("keys" in wants, rows.class_rows if index == looked or "class_attention" in wants else None)
            # Nothing looks at the padding that the last global layer would give.
            ends = index == last and index >= self._local
            rows.states = run_layer(layer, rows, seen, rows.real + kept if ends else rows.states.shape[1])
            if index == looked:
                class_attention = seen.class_attention
            if index in self._intermediate:
                marks[index] = rows.mark(kept)
            if leaving is not None:
                keys = [image.key for image in images]
                into = rows.leave(leaving, plan[index + 1], keys, seen.keys, seen.class_attention)
                if class_attention is not None:
                    # Without global layers rows go behind the layer that is looked at, too.
                    class_attention = sums_by(class_attention[..., None], into, rows.real)[..., 0]
        if self._local > last:
            self._end_local_layers(rows, ids, tiles)
        # The intermediate layers' channels are interleaved.
        mixed = torch.stack([marks[index].of(rows.real) for index in self._intermediate], -1).flatten(-2)
        sizes = rows.sizes if rows.sizes is None or rows.weighs else torch.ones_like(rows.sizes)
        features = torch.cat([rows.states[:, : rows.real + kept], mixed], -1)
        return Encoding(features, rows.real, class_attention, rows.group, sizes)

    def _end_local_layers(self, rows: Rows, ids: Tensor, tiles: int) -> None:
        """Makes of the local layers' states what the global layers take."""
        rows.states = self.vision.layernorm_post(rows.states)
        rows.add_by_tile(self._tile_embedding(self.vision.post_tile_positional_embedding, ids, tiles))

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


def given_policy(policy: Any) -> TowerPolicy | None:
    """``policy``, or None for one that keeps everything. Raises ``TypeError`` for what is none."""
    if policy is not None and not isinstance(policy, TowerPolicy):
        raise TypeError(f"tower_policy={policy!r} is no tower policy: give an instance, such as Alike(keep=0.5)")
    return None if policy is None or policy.keep == 1 else policy


def looked_layer(local: int, layers: int) -> int:
    """The layer whose class tokens' attention ``Encoding.class_attention`` is: the last but one if that is global, else the
    last."""
    return layers - 2 if local <= layers - 2 else layers - 1


def _check_padding(tower_tiles: TowerTiles, policy: TowerPolicy | None, keep_padding: bool) -> None:
    """Raises ``ValueError`` where padding tiles' features are wanted and not all there."""
    if keep_padding and (tower_tiles != "all" or policy is not None):
        given = f"tower_tiles={tower_tiles!r}" if policy is None else f"a tower policy, {policy}"
        raise ValueError(
            f'{given}: not every padding tile\'s feature is there for rows="transformers" to look at; use rows="meta"'
        )


@cache
def tower_plan(policy: TowerPolicy | None, tiles: int, tokens: int, layers: int, global_layers: int) -> tuple[int, ...]:
    """See ``Tower.plan``: of an image of ``tiles`` real tiles of ``tokens`` each. Raises as ``TowerPolicy.plan`` does."""
    if policy is None or policy.keep == 1:
        return (tiles * tokens,) * (layers + global_layers + 1)
    return tuple(policy.plan(tiles, tokens, layers, global_layers))


def _patches(convolution: Any, pixels: Tensor) -> Tensor:
    """(n, patches, width) of pixels (n, 3, side, side). The convolution's windows do not overlap and it has no bias, so that it
    is a matrix product; as one it needs no plan of cuDNN's for each number of tiles, and is no exception in fp32, where torch
    multiplies in full precision and convolves in TF32."""
    size = convolution.kernel_size[0]
    rows = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return F.linear(rows, convolution.weight.flatten(1))
