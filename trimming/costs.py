"""What a model's stages cost, in bytes and operations, by formula: nothing here runs the model.

Operations are floating-point operations of matrix products, attention's two among them, and of the patch embedding: two a
multiply-add. Of causal attention the lower half counts, of a batch nothing that pads it. Norms, activations, softmax, rotary
embedding, selection and sampling are left out.

Bytes are the least that a stage must move through the device's memory: the weights it uses, once a call; what it takes in and
hands on (pixels, features, embeddings, logits), once; keys and values, written once where they are projected and read once by
those that attend to them. Other activations are left out: nothing but room on the chip makes them touch memory.

Rows before the image and rows without one are the engine's under ``rows="meta"``: cross-attention layers skip them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from transformers import MllamaConfig

from trimming.attention import CHUNK_ELEMENTS
from trimming.clustering import MAP_PASSES
from trimming.tower import TowerPolicy, TowerTiles, padding_of, tower_plan

if TYPE_CHECKING:
    from trimming.engine.request import KeptSets


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that key/value caches follow from."""

    self_layers: int
    cross_layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: MllamaConfig) -> Geometry:
        text = config.text_config
        cross = len(text.cross_attention_layers)
        return cls(
            self_layers=text.num_hidden_layers - cross,
            cross_layers=cross,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
        )

    def layer_kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * itemsize

    def cross_kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one visual token in all cross-attention layers."""
        return self.cross_layers * self.layer_kv_bytes(itemsize)

    def self_kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one text token in all self-attention layers."""
        return self.self_layers * self.layer_kv_bytes(itemsize)


@dataclass(frozen=True, slots=True)
class Cost:
    """See the module's docstring for what is counted."""

    operations: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Cost:
        return Cost(round(self.operations * factor), round(self.bytes * factor))

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        """The roofline: on a device of these rates it takes no less. For one call: a sum over calls hides which bound each."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Costs of a batch by stage."""

    tower: Cost
    projector: Cost
    cross_kv: Cost
    prefill: Cost
    decode: Cost

    def __add__(self, other: Stages) -> Stages:
        return Stages(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def total(self) -> Cost:
        return sum((getattr(self, f.name) for f in fields(self)), Cost())

    @property
    def tower_share(self) -> float:
        """The tower's share of the operations."""
        return self.tower.operations / self.total.operations


@dataclass(frozen=True, slots=True)
class Look:
    """Text rows that attend to the same visual tokens: in a prefill the rows from an image on, of a prompt or of several that
    decide together; in decoding the sequences that share what they keep."""

    rows: int
    first: int
    """Visual tokens that the first cross-attention layer attends to: in a prefill all, in decoding the kept ones."""
    later: int
    """Visual tokens that the layers behind it attend to: the kept ones."""


class Costs:
    """Costs of one model's stages, each as one call of the engine's has it.

    Args:
        config: the model's; its weights are not needed.
        itemsize: bytes of one number, of weights, features, keys and values alike: 2 for bf16.
    """

    def __init__(self, config: MllamaConfig, itemsize: int = 2) -> None:
        self.text, self.vision = text, vision = config.text_config, config.vision_config
        self.geometry, self.itemsize = Geometry.of(config), itemsize
        self.tokens: int = (vision.image_size // vision.patch_size) ** 2 + 1
        """Visual tokens of a tile."""

        # Parameters, in numbers. The tower: four projections without bias, an MLP and two norms with; in the global layers two
        # gates. The class token, the patch embedding, two norms, positions, and the gates of three tables.
        wide, self._vision_layers = vision.hidden_size, vision.num_hidden_layers + vision.num_global_layers
        self._patch: int = vision.num_channels * vision.patch_size**2
        layer = 4 * wide**2 + (2 * wide + 1) * vision.intermediate_size + 5 * wide
        self._tower = self._vision_layers * layer + 2 * vision.num_global_layers + (self._patch + 5 + self.tokens) * wide + 3
        # Each arrangement of tiles has rows of its own in the tables, and so has the want of an image.
        self._arrangement = vision.max_num_tiles * (self.tokens + 2) * wide
        tables = (len(vision.supported_aspect_ratios) + 1) * self._arrangement

        width = text.hidden_size
        self._projector = (vision.vision_output_dim + 1) * width
        self._kv = 2 * width * self.geometry.kv_heads * self.geometry.head_dim
        # What every row of a layer is multiplied by: queries, output, the gated MLP.
        self._row = 2 * width**2 + 3 * width * text.intermediate_size
        self._self_layer = self._row + self._kv + 2 * width
        # Two norms, the queries' norm, two gates; apart from it the keys' and values' projections, which decoding leaves alone.
        self._cross_layer = self._row + 2 * width + self.geometry.head_dim + 2
        self._cross_kv = self._kv + self.geometry.head_dim
        self._head = width * text.vocab_size
        layers = self.geometry.self_layers * self._self_layer
        layers += self.geometry.cross_layers * (self._cross_layer + self._cross_kv)
        # The embedding table has 8 rows more than the head, for the image token.
        language = layers + width + self._head + 8 * width + self._head
        self.weights = {
            "tower": itemsize * (self._tower + tables),
            "projector": itemsize * self._projector,
            "language": itemsize * language,
        }
        """Bytes of all parameters."""

    def tower_rows(self, tiles: int, tower_policy: TowerPolicy | None = None) -> tuple[int, ...]:
        """Rows of ``tiles`` real tiles that enter each of the tower's layers, and that are left behind the last one."""
        vision = self.vision
        return tower_plan(tower_policy, tiles, self.tokens, vision.num_hidden_layers, vision.num_global_layers)

    def tower(
        self, tiles: int, images: int = 1, tower_tiles: TowerTiles = "pooled", tower_policy: TowerPolicy | None = None
    ) -> Cost:
        """``images`` of ``tiles`` real tiles each, to the features that the projector takes.

        As ``trimming.tower`` has it: patches of real tiles; real rows attend to all, padding rows to real ones; the last layer
        gives real rows only. How a policy finds the rows that merge is part of it.
        """
        vision, wide = self.vision, self.vision.hidden_size
        rows, head = self.tower_rows(tiles, tower_policy), wide // vision.attention_heads
        padding = len(
            padding_of(
                tiles, tiles if tower_tiles == "real" else vision.max_num_tiles, self.tokens, tower_tiles == "pooled"
            ).sizes
        )
        kv, rest = 2 * wide**2, 2 * wide**2 + 2 * wide * vision.intermediate_size
        added = tiles * (self.tokens - 1) * wide * self._patch
        # Pixels, rows of the tables, keys and values written and read, features.
        moved = tiles * vision.num_channels * vision.image_size**2 + self._arrangement + rows[-1] * vision.vision_output_dim
        local, matching = vision.num_hidden_layers, 0
        if rows[local] < rows[0]:
            # Means over tiles of their embeddings.
            added += rows[local] * tiles * wide
        for layer, real in enumerate(rows[:-1]):
            last = layer == self._vision_layers - 1
            every, asking = real + padding, real if last else real + padding
            added += every * kv + asking * rest + 2 * wide * (real * every + (asking - real) * real)
            moved += every * 4 * wide
            if tower_policy is not None and rows[layer + 1] < real:
                matching += tower_policy.operations(real - tiles, rows[layer + 1] - tiles, wide, head)
                if "class_attention" in tower_policy.looks_at:
                    added += tiles * every * wide
        return Cost(images * (2 * added + matching), self.itemsize * (self._tower + images * moved))

    def projector(self, tiles: int, images: int = 1, tower_policy: TowerPolicy | None = None) -> Cost:
        """Real tiles' features, from the tower's width to the language model's."""
        rows = images * self.tower_rows(tiles, tower_policy)[-1]
        wide, width = self.vision.vision_output_dim, self.text.hidden_size
        return Cost(2 * rows * wide * width, self.itemsize * (self._projector + rows * (wide + width)))

    def clustering(self, tiles: int, images: int = 1, tower_policy: TowerPolicy | None = None) -> Cost:
        """Real tiles' features, merged where they are alike (``trimming.clustering``), each image by itself: the products of
        all pairs. Of bytes the map of their distances in float32, written and read some times over."""
        features, width = self.tower_rows(tiles, tower_policy)[-1], self.text.hidden_size
        moved = MAP_PASSES * features**2 * 4 + 2 * features * width * self.itemsize
        return Cost(2 * images * features**2 * width, images * moved)

    def cross_kv(self, first: int, later: int) -> Cost:
        """Keys and values of ``first`` visual tokens in the first cross-attention layer, of ``later`` ones in each behind it.

        Sums over a batch: ``first`` counts each image once, and not at all where an earlier prompt has had them projected;
        ``later`` counts what of an image is in any of its kept sets, once: where sets differ, each is gathered from that, which
        is left out. Every layer reads its features anew.
        """
        behind = self.geometry.cross_layers - 1
        tokens = first + behind * later
        layers = (first > 0) + behind * (later > 0)
        moved = self.itemsize * (layers * self._cross_kv + tokens * self.text.hidden_size)
        return Cost(2 * tokens * self._kv, moved + tokens * self.geometry.layer_kv_bytes(self.itemsize))

    def prefill(self, prompts: Sequence[int], looks: Sequence[Look] = ()) -> Cost:
        """The language model over prompts of these tokens, packed; logits of each one's last row. Without ``cross_kv``."""
        rows, attended = sum(prompts), sum(n * (n + 1) // 2 for n in prompts)
        cost = self._language(len(prompts), rows, attended, rows, looks)
        if self.text.num_hidden_layers - 1 in self.text.cross_attention_layers:
            return cost
        # Of the last layer only each prompt's last row is wanted.
        spared = (rows - len(prompts)) * self._row + 2 * self.text.hidden_size * (attended - rows)
        return Cost(cost.operations - 2 * spared, cost.bytes)

    def decode(self, lengths: Sequence[int], looks: Sequence[Look] = ()) -> Cost:
        """One step: a token for each of the sequences, which attend to these many tokens, the new one among them.

        Sequences that share what they keep stand in one ``Look`` and read it together.
        """
        return self._language(len(lengths), len(lengths), sum(lengths), sum(lengths), looks)

    def _language(self, sequences: int, rows: int, attended: int, read: int, looks: Sequence[Look]) -> Cost:
        """``attended``: pairs of rows in self-attention. ``read``: tokens whose keys and values it reads."""
        geometry, width = self.geometry, self.text.hidden_size
        own, cross = geometry.self_layers, geometry.cross_layers
        seen = [look.first + (cross - 1) * look.later for look in looks]
        added = own * (rows * (self._row + self._kv) + 2 * width * attended) + sequences * self._head
        added += sum(look.rows * (cross * self._row + 2 * width * tokens) for look, tokens in zip(looks, seen, strict=True))
        weights = own * self._self_layer + bool(looks) * cross * self._cross_layer + width + self._head
        moved = self.itemsize * (weights + rows * width + sequences * self.text.vocab_size)
        moved += (rows + read) * geometry.self_kv_bytes(self.itemsize) + sum(seen) * geometry.layer_kv_bytes(self.itemsize)
        return Cost(2 * added, moved)

    def activations(self, *, images: int, visual: int, prompt: int, sequences: int, each_layer: bool = False) -> int:
        """Bytes that the engine's stages take at most of a device's memory, beside weights, keys and values; about.

        The largest tensors that are there at once, by reading the stages' code: encoded images that wait for their prefill, and
        of tower, prefill and sampling whichever takes most.

        Args:
            images: of the most tiles, that go through the tower at once.
            visual: visual tokens of one prefill.
            prompt: tokens of one prefill.
            sequences: that decode at once.
            each_layer: whether the policy decides in each layer, which holds all layers' keys and values until the last one.
        """
        text, vision, wide, width = self.text, self.vision, self.vision.hidden_size, self.text.hidden_size
        key_value = 2 * self.geometry.kv_heads * self.geometry.head_dim
        rows = images * vision.max_num_tiles * (self.tokens + -self.tokens % 8)
        between = vision.vision_output_dim - wide
        # Behind the tower: the intermediate layers' states, the same interleaved, both joined, and projected. In its last
        # layers: those states, the MLP's before and behind its activation, and a layer's own.
        joined = 2 * between + vision.vision_output_dim + width
        tower = rows * max(joined, between + 9 * wide + 2 * vision.intermediate_size)
        # The features of a batch, their keys, values and normed keys.
        prefill = prompt * (3 * text.intermediate_size + 6 * width) + visual * (width + 3 * key_value // 2)
        prefill += each_layer * self.geometry.cross_layers * visual * key_value
        # The larger of: three maps of a chunk's attention in fp32; an image's features while they are merged, two copies in
        # fp32 and three in their own dtype.
        deciding = max(3 * CHUNK_ELEMENTS * 4, vision.max_num_tiles * self.tokens * width * (2 * 4 + 3 * self.itemsize))
        # Sampling sorts and sums in fp32 and fp64.
        sampling = sequences * text.vocab_size * (2 * self.itemsize + 40)
        encoded = (visual + rows) * width
        return self.itemsize * encoded + max(self.itemsize * tower, self.itemsize * prefill + deciding, sampling)

    def kv_bytes(self, text: int, visual: int) -> int:
        """What a sequence of ``text`` tokens that keeps ``visual`` visual tokens holds. The engine's slots are a little longer
        and its segments' parts aligned; sequences that share what they keep hold it once."""
        return text * self.geometry.self_kv_bytes(self.itemsize) + visual * self.geometry.cross_kv_bytes(self.itemsize)

    def batch(
        self,
        *,
        tiles: int,
        prompt: int,
        output: int,
        keep: float = 1.0,
        images: int = 1,
        questions: int = 1,
        before: int = 0,
        tower_tiles: TowerTiles = "pooled",
        tower_policy: TowerPolicy | None = None,
        kept_sets: KeptSets = "image",
        merged: bool = False,
    ) -> Stages:
        """``images`` × ``questions`` rows that go through every stage side by side: one call of each, output − 1 of decode.

        Divided by the rows it is one row's: the larger the batch, the smaller its part of the weights' bytes.

        Args:
            tiles: real tiles of each image.
            prompt: tokens of each prompt, the image's own among them; ``before``: those before it.
            output: tokens of each answer. The prefill gives the first one, and the last one is never fed back.
            keep: share of what the tower leaves that stays, as Trimmed-Llama has it: the first cross-attention layer's prefill
                sees all of it.
            questions: about each image, which is encoded once.
            tower_tiles, tower_policy: as in ``tower``.
            kept_sets: ``image``: an image's questions decide together, and share one kept set. ``question``: each has its own,
                which it shares only if that is everything; those of one image are taken to overlap as little as they can.
            merged: ``keep`` is what is left of an image's features once those that are alike are merged (``Clusters``): all
                layers see that alone, and all questions about the image share it.
        """
        rows, visual = images * questions, self.tower_rows(tiles, tower_policy)[-1]
        kept = max(1, round(keep * visual))
        together = questions if kept_sets == "image" or merged else 1
        sharing = questions if kept == visual else together
        seen = kept if merged else visual
        own = questions // sharing
        steps = [self.decode([prompt + n] * rows, [Look(sharing, kept, kept)] * (images * own)) for n in range(1, output)]
        looks = [Look(together * (prompt - before), seen, kept)] * (rows // together)
        return Stages(
            tower=self.tower(tiles, images, tower_tiles, tower_policy),
            projector=self.projector(tiles, images, tower_policy)
            + (self.clustering(tiles, images, tower_policy) if merged else Cost()),
            cross_kv=self.cross_kv(images * seen, images * min(own * kept, visual)),
            prefill=self.prefill([prompt] * rows, looks),
            decode=sum(steps, Cost()),
        )
