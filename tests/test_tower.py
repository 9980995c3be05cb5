"""Rows of the vision tower that stand for several, against the same said row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tiny import (
    IMAGE,
    RATIO_OF_TILES,
    TILE,
    TILES,
    Prompt,
    Row,
    complete,
    inputs_of,
    make_engine,
    make_prompts,
    record_logits,
    run_alone,
    tiny_model,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaConfig, MllamaForConditionalGeneration

from trimming import (
    Clusters,
    DivPrune,
    ElasticCache,
    FastV,
    Grid,
    KeepAll,
    Policy,
    Random,
    SnapKV,
    Spread,
    ThinK,
    TrimmedLlama,
    VisionZip,
    WeightedFarthest,
    ZipVL,
    trim,
)
from trimming.engine import Image, Request
from trimming.merging import sorted_sums, sums_by
from trimming.tower import Alike, EViT, GridRows, RandomRows, ToMe, Tower, TowerPolicy, TowerTiles, Windows, padding_of
from trimming.tower.layer import weighed_attention
from trimming.tower.padding import POOLED_SIDE

SIDE = 6
TOKENS = SIDE**2 + 1
LOCAL, GLOBAL = 4, 2
POLICIES = [Alike(0.6), ToMe(0.6), ToMe(0.5, weighted=False), EViT(0.6), Windows(0.6), RandomRows(0.6), GridRows(0.6)]


@cache
@torch.inference_mode(False)
def deep_model(dtype: torch.dtype = torch.float32) -> MllamaForConditionalGeneration:
    """A tower of several layers over finer patches than ``tiny_model``'s, so that there is something to pool and to merge."""
    config = MllamaConfig.from_dict(tiny_model().config.to_dict())
    for name, value in {
        "patch_size": TILE // SIDE,
        "num_hidden_layers": LOCAL,
        "num_global_layers": GLOBAL,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 96,
    }.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config).eval()
    vision: Any = model.model.vision_model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        vision.gated_positional_embedding.gate.fill_(0.4)
        for module in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
            module.embedding.weight.normal_(std=0.5)
            module.gate.fill_(0.5)
        for layer in vision.global_transformer.layers:
            layer.gate_attn.fill_(0.7)
            layer.gate_ffn.fill_(0.7)
        for index in config.text_config.cross_attention_layers:
            layer: Any = model.model.language_model.layers[index]
            layer.cross_attn_attn_gate.fill_(0.8)
            layer.cross_attn_mlp_gate.fill_(0.6)
            layer.cross_attn.q_norm.weight.fill_(2.0)
        model.model.language_model.embed_tokens.weight.mul_(10)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def make_images(tiles: int, count: int = 3) -> list[Image]:
    """Of plain areas with noise on them, so that some patches are alike and none are equal."""
    generator = torch.Generator().manual_seed(tiles)
    images = []
    for i in range(count):
        areas = torch.randn(tiles, 3, 3, 3, generator=generator)
        pixels = F.interpolate(areas, size=(TILE, TILE)) + 0.1 * torch.randn(tiles, 3, TILE, TILE, generator=generator)
        images.append(Image(f"{tiles}/{i}", pixels, RATIO_OF_TILES[tiles]))
    return images


def make_tower(
    policy: TowerPolicy | None = None, tower_tiles: TowerTiles = "pooled", dtype: torch.dtype = torch.float32
) -> Tower:
    return Tower(deep_model(dtype), lambda pixels: pixels.to(dtype), tower_tiles, policy)


# ---- row by row ---------------------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """A row, said plainly."""

    state: Tensor
    tile: int
    members: list[int]
    """Places on the axis of tiles × tokens, of the fill behind it."""
    padding: bool
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: float = 0.0
    kept: dict[int, Tensor] = field(default_factory=dict)
    """States of the layers that the projector wants."""

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def alone(self) -> bool:
        """Whether it is a tile's class token."""
        return self.members[0] % TOKENS == 0


def plain_tower(tower: Tower, image: Image) -> tuple[Tensor, list[list[int]]]:
    """Features of what is left of an image, and the members of each."""
    vision, policy = tower.vision, tower.policy
    tiles = len(image.pixels)
    there = tiles if tower.tower_tiles == "real" else TILES
    ids = torch.tensor([image.ratio_id])
    embedded = tower._embed(image.pixels, ids, tiles, there)[0]
    rows = [Plain(embedded[t, i], t, [t * TOKENS + i], t >= tiles) for t in range(there) for i in range(TOKENS)]
    fill = -TOKENS % 8
    rows += [
        Plain(torch.zeros_like(rows[0].state), t, [there * TOKENS + t * fill + i], True)
        for t in range(there)
        for i in range(fill)
    ]
    if tower.tower_tiles == "pooled":
        rows = [row for row in rows if not row.padding] + pooled([row for row in rows if row.padding], there)
    weighs = policy is not None and policy.weighs
    plan = tower.plan(tiles)
    layers = [*vision.transformer.layers, *vision.global_transformer.layers]
    after = tower._tile_embedding(vision.post_tile_positional_embedding, ids, there)[0]
    for number, layer in enumerate(layers):
        if number == LOCAL:
            for row in rows:
                mean = torch.stack([after[m // TOKENS] for m in row.members]).mean(0) if not row.padding else after[row.tile]
                row.state = vision.layernorm_post(row.state) + mean
        attend(layer, rows, weighs)
        if number < LOCAL and number in vision.intermediate_layers_indices:
            for row in rows:
                row.kept[number] = row.state
        if plan[number + 1] < plan[number]:
            assert policy is not None
            real = [row for row in rows if not row.padding]
            fixed, free = [r for r in real if r.alone], [r for r in real if not r.alone]
            merged = DECIDE[type(policy)](policy, free, plan[number + 1] - len(fixed), image.key)
            rows = sorted(fixed + merged, key=lambda row: row.members[0]) + [row for row in rows if row.padding]
    left = [row for row in rows if not row.padding]
    joined = []
    for row in left:
        mixed = torch.stack([row.kept[number] for number in vision.intermediate_layers_indices], -1).flatten()
        joined.append(torch.cat([row.state, mixed]))
    return tower.projector(torch.stack(joined)), [row.members for row in left]


def pooled(rows: list[Plain], tiles: int) -> list[Plain]:
    groups: dict[Any, list[Plain]] = {}
    for row in rows:
        place = row.members[0]
        if place >= tiles * TOKENS:
            groups.setdefault((row.tile, "fill"), []).append(row)
        elif row.alone:
            groups.setdefault((row.tile, "class"), []).append(row)
        else:
            y, x = divmod(place % TOKENS - 1, SIDE)
            groups.setdefault((row.tile, y * POOLED_SIDE // SIDE, x * POOLED_SIDE // SIDE), []).append(row)
    return [
        Plain(torch.stack([r.state for r in several]).mean(0), several[0].tile, [r.members[0] for r in several], True)
        for several in groups.values()
    ]


def attend(layer: Any, rows: list[Plain], weighs: bool) -> None:
    """One layer, a row at a time and a head at a time; each row's key and what class tokens see of it are noted."""
    attention = layer.self_attn
    heads, width = attention.num_heads, attention.head_dim
    normed = [layer.input_layernorm(row.state) for row in rows]
    query, key, value = (
        [p(n).view(heads, width) for n in normed] for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    new, looked = [], torch.zeros(len(rows))
    for i, row in enumerate(rows):
        seen = [j for j, other in enumerate(rows) if not (row.padding and other.padding)]
        out = []
        for head in range(heads):
            logits = torch.stack([query[i][head] @ key[j][head] * attention.scaling for j in seen])
            counts = torch.tensor([float(rows[j].size) if rows[j].padding or weighs else 1.0 for j in seen])
            weights = logits.sub(logits.max()).exp() * counts
            weights = weights / weights.sum()
            out.append(sum(w * value[j][head] for w, j in zip(weights, seen, strict=True)))
            if row.alone and not row.padding:
                looked[seen] += weights
        attended = attention.o_proj(torch.cat(out))
        state = row.state + (layer.gate_attn.tanh() * attended if layer.is_gated else attended)
        forward = layer.mlp(layer.post_attention_layernorm(state)[None])[0]
        new.append(state + (layer.gate_ffn.tanh() * forward if layer.is_gated else forward))
    for i, row in enumerate(rows):
        row.state, row.key, row.seen = new[i], key[i].mean(0), float(looked[i])


def united(rows: list[Plain], weights: list[float] | None = None) -> Plain:
    """One row for several: its state the mean by ``weights``, kept states by size."""
    sizes = [float(row.size) for row in rows]

    def mean(states: list[Tensor], by: list[float]) -> Tensor:
        return sum((s * w for s, w in zip(states, by, strict=True)), torch.zeros(())) / sum(by)  # type: ignore[return-value]

    kept = {number: mean([row.kept[number] for row in rows], sizes) for number in rows[0].kept}
    key = mean([row.key for row in rows], sizes)
    members = sorted(m for row in rows for m in row.members)
    return Plain(mean([row.state for row in rows], weights or sizes), members[0] // TOKENS, members, False, key, kept=kept)


def match(rows: list[Plain], left: int, by: str) -> list[Plain]:
    while len(rows) > left:
        rows = paired(rows, max(left, len(rows) // 2), by)
    return sorted(rows, key=lambda row: row.members[0])


def paired(rows: list[Plain], left: int, by: str) -> list[Plain]:
    """Where they stood; one that another has joined at its own place."""
    ones, others = rows[::2], rows[1::2]
    best = []
    for i, row in enumerate(ones):
        alike = [float(F.cosine_similarity(getattr(row, by), getattr(other, by), dim=0)) for other in others]
        best.append((max(alike), i, alike.index(max(alike))))
    best.sort(reverse=True)
    joining: dict[int, list[Plain]] = {}
    for _, i, j in best[: len(rows) - left]:
        joining.setdefault(j, []).append(ones[i])
    gone = [id(row) for several in joining.values() for row in several]
    stay = []
    for place, row in enumerate(rows):
        if place % 2:
            stay.append(united([row, *joining[place // 2]]) if place // 2 in joining else row)
        elif id(row) not in gone:
            stay.append(row)
    return stay


def leave_unlooked(policy: TowerPolicy, rows: list[Plain], left: int, key: str) -> list[Plain]:
    ranked = sorted(rows, key=lambda row: -row.seen)
    rest = ranked[left - 1 :]
    return [*ranked[: left - 1], united(rest, [row.seen for row in rest])]


def merge_windows(policy: TowerPolicy, rows: list[Plain], left: int, key: str) -> list[Plain]:
    """Greedily, one window at a time of those that a round finds."""
    while len(rows) > left:
        at = {row.members[0]: row for row in rows}
        found = []
        for place in at:
            tile, patch = divmod(place, TOKENS)
            y, x = divmod(patch - 1, SIDE)
            for size in (1, 2, 4):
                if y % (2 * size) or x % (2 * size) or max(y, x) + 2 * size > SIDE:
                    continue
                corners = [tile * TOKENS + 1 + (y + dy) * SIDE + x + dx for dy in (0, size) for dx in (0, size)]
                four = [at[c] for c in corners if c in at and at[c].size == size**2]
                if len(four) == 4:
                    mean = sum(row.state for row in four)
                    found.append((min(float(F.cosine_similarity(row.state, mean, dim=0)) for row in four), four))
        found.sort(key=lambda pair: -pair[0])
        for _, four in found[: (len(rows) - left) // 3]:
            rows = [row for row in rows if not any(row is one for one in four)] + [united(four)]
    return rows


def draw(policy: Any, rows: list[Plain], left: int, key: str) -> list[Plain]:
    from trimming.policies.random import generator_of

    tiles = 1 + max(row.members[0] for row in rows) // TOKENS
    ranks = torch.randperm(tiles * TOKENS, generator=generator_of(policy.seed, key)).tolist()
    return sorted(rows, key=lambda row: ranks[row.members[0]])[:left]


def thin(policy: TowerPolicy, rows: list[Plain], left: int, key: str) -> list[Plain]:
    def rank(row: Plain) -> Any:
        tile, patch = divmod(row.members[0], TOKENS)
        y, x = divmod(patch - 1, SIDE)
        return [((y >> b ^ x >> b) & 1, y >> b & 1) for b in range(4)], patch, tile

    return sorted(rows, key=rank)[:left]


DECIDE: dict[type[TowerPolicy], Any] = {
    Alike: lambda policy, rows, left, key: match(rows, left, "state"),
    ToMe: lambda policy, rows, left, key: match(rows, left, "key"),
    EViT: leave_unlooked,
    Windows: merge_windows,
    RandomRows: draw,
    GridRows: thin,
}


# ---- exactness ----------------------------------------------------------------------------------------------------------


# Of the last two more than half of the rows go at once.
@pytest.mark.parametrize("policy", [None, *POLICIES, Alike(0.25), ToMe(0.22)], ids=repr)
@pytest.mark.parametrize("tiles", [1, 3])
@torch.inference_mode()
def test_the_tower_is_what_is_said_row_by_row(policy: TowerPolicy | None, tiles: int) -> None:
    images, tower = make_images(tiles, 2), make_tower(policy)
    found = tower.encode(images)
    for row, image in enumerate(images):
        wanted, members = plain_tower(tower, image)
        torch.testing.assert_close(found.features[row], wanted, atol=1e-4, rtol=1e-4)
        if policy is not None:
            assert found.group is not None
            assert found.sizes is not None
            group = found.group[row].tolist()
            assert [[m for m, g in enumerate(group) if g == number] for number in range(len(members))] == members
            assert found.sizes[row].tolist() == [len(m) if policy.weighs else 1 for m in members]


@pytest.mark.parametrize("tower_tiles", ["real", "all"])
@torch.inference_mode()
def test_rows_merge_whatever_the_padding_is(tower_tiles: TowerTiles) -> None:
    (image,), tower = make_images(2, 1), make_tower(Alike(0.6), tower_tiles)
    wanted, _ = plain_tower(tower, image)
    torch.testing.assert_close(tower.encode([image]).features[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tower_tiles", ["pooled", "all", "real"])
@torch.inference_mode()
def test_a_policy_that_keeps_everything_is_the_tower_bit_for_bit(tower_tiles: TowerTiles) -> None:
    images = make_images(2)
    whole = make_tower(None, tower_tiles).look(images)
    for policy in (Alike(1.0), EViT(1.0), RandomRows(1)):
        found = make_tower(policy, tower_tiles).look(images)
        assert torch.equal(found.features, whole.features)
        assert found.class_attention is not None
        assert torch.equal(found.class_attention, whole.class_attention)  # type: ignore[arg-type]
        assert (found.group, found.sizes) == (None, None)


@pytest.mark.parametrize(("global_layers", "intermediate"), [(0, [-1, 0]), (0, [1, 1]), (2, [-2])])
@torch.inference_mode()
def test_towers_of_other_layers_are_exact_too(global_layers: int, intermediate: list[int]) -> None:
    """Without global layers, the last one's states are the local ones', and the class tokens' attention the last layer's."""
    config = MllamaConfig.from_dict(tiny_model().config.to_dict())
    config.vision_config.num_global_layers = global_layers
    config.vision_config.intermediate_layers_indices = intermediate
    config.vision_config.vision_output_dim = 32 * (1 + len(intermediate))
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    tower = Tower(model, lambda pixels: pixels, "all")
    for tiles in (1, 3, 4):
        (image,) = make_images(tiles, 1)
        inputs = inputs_of([IMAGE], [image])
        wanted = model.model.vision_model(
            **{name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        ).last_hidden_state.flatten(1, 3)
        found = tower.see([image], look=True)
        torch.testing.assert_close(found.features, wanted[:, : found.real], atol=1e-5, rtol=1e-5)
        assert found.class_attention is not None
        assert found.class_attention.sum() <= 1 + 1e-5
        with trim(model, VisionZip(0.5), rows="meta") as trimmed:
            model(**inputs)
        engine = make_engine(VisionZip(0.5), model, tower_tiles="all")
        (answer,) = engine.generate([Request(id="it", tokens=[IMAGE], images=[image], max_new_tokens=1)])
        assert torch.equal(trimmed.samples[0].kept, answer.trim.kept)
        merging = Tower(model, lambda pixels: pixels, "all", Alike(0.7)).see([image], look=True)
        assert merging.features.shape[1] == merging.real < found.real
        # What rows had that merged is theirs together.
        assert merging.class_attention is not None
        assert merging.class_attention.shape == (1, merging.real)
        if not global_layers:
            assert merging.group is not None
            assert 0 < merging.class_attention.sum() <= 1 + 1e-5


def test_an_intermediate_layer_that_is_none_is_refused() -> None:
    config = MllamaConfig.from_dict(tiny_model().config.to_dict())
    config.vision_config.intermediate_layers_indices = [2]
    with pytest.raises(IndexError):
        Tower(MllamaForConditionalGeneration(config), lambda pixels: pixels)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@torch.inference_mode()
def test_neighbours_and_repetition_change_nothing(policy: TowerPolicy) -> None:
    images, tower = make_images(3, 4), make_tower(policy)
    together = tower.look(images)
    again = tower.look(images)
    assert torch.equal(again.features, together.features)
    assert together.group is not None
    assert together.class_attention is not None
    for row, image in enumerate(images):
        alone = tower.look([image])
        assert torch.equal(alone.group[0], together.group[row])  # type: ignore[index]
        torch.testing.assert_close(alone.features[0], together.features[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.class_attention[0], together.class_attention[row], atol=1e-6, rtol=1e-4)  # type: ignore[index]
    assert len({tuple(one.tolist()) for one in together.group}) == (1 if isinstance(policy, GridRows) else len(images))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@torch.inference_mode()
def test_what_is_left(policy: TowerPolicy, tiles: int) -> None:
    tower = make_tower(policy)
    plan = list(tower.plan(tiles))
    found = tower.encode(make_images(tiles, 2))
    assert found.group is not None
    assert found.sizes is not None
    assert found.features.shape[:2] == found.sizes.shape == (2, plan[-1])
    assert plan[0] == tiles * TOKENS
    assert plan == sorted(plan, reverse=True)
    assert sum(plan[:-1]) / plan[0] / (LOCAL + GLOBAL) == pytest.approx(policy.keep, abs=0.05)
    assert tower.keep_fraction([tiles, tiles]) == pytest.approx(sum(plan[:-1]) / plan[0] / (LOCAL + GLOBAL))
    for group, sizes in zip(found.group, found.sizes, strict=True):
        members = torch.bincount(group[group >= 0], minlength=plan[-1])
        assert members.min() >= 1
        # Class tokens stay for themselves.
        assert members[group[::TOKENS]].tolist() == [1] * tiles
        assert (members == sizes).all() or not policy.weighs
        if isinstance(policy, Alike | EViT | Windows):
            assert group.min() == 0
        if isinstance(policy, RandomRows | GridRows):
            assert members.max() == 1


def test_a_share_that_the_first_layer_exceeds_is_refused() -> None:
    make_tower(Alike(0.2))
    with pytest.raises(ValueError, match=r"keep=0.16 of the tower: its first layer alone, .* is 0.167 of it"):
        make_tower(Alike(0.16))
    with pytest.raises(ValueError, match=r"keep=0.18: windows leave a tile of \d+ × \d+ patches \d+ rows or more"):
        make_tower(Windows(0.18))
    with pytest.raises(ValueError, match="tower_tiles='some' is none of pooled, all, real"):
        make_tower(None, "some")  # type: ignore[arg-type]
    for wrong in (0, -1, 1.01, math.nan):
        with pytest.raises(ValueError, match="share of the tower"):
            Alike(wrong)


# ---- padding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [10, 37, 257, 1601])
@pytest.mark.parametrize("real", [1, 2, 4])
def test_pooled_padding_counts_as_often_as_there_is(tokens: int, real: int) -> None:
    whole, pooled = padding_of(real, 4, tokens, False), padding_of(real, 4, tokens, True)
    assert whole.alone
    assert len(whole.group) == len(pooled.group) == 4 * (tokens + -tokens % 8) - real * tokens
    assert torch.bincount(pooled.group).tolist() == pooled.sizes.tolist()
    windows = min(round((tokens - 1) ** 0.5), POOLED_SIDE) ** 2
    assert len(pooled.sizes) == (4 - real) * (1 + windows) + 4 * (tokens % 8 > 0)
    # Of one tile each, and even.
    for number, tile in enumerate(pooled.tile.tolist()):
        assert set(whole.tile[pooled.group == number].tolist()) == {tile}
    sides = (tokens - 1) ** 0.5 / POOLED_SIDE
    assert pooled.sizes.max() <= math.ceil(sides) ** 2 + 7


@torch.inference_mode()
def test_pooled_padding_is_exact_without_padding_tiles_and_close_with() -> None:
    for tiles in (1, 2, 3, 4):
        images = make_images(tiles)
        whole, pooled, real = (make_tower(None, way).encode(images).features for way in ("all", "pooled", "real"))
        away, without = ((torch.linalg.norm(t - whole) / torch.linalg.norm(whole)).item() for t in (pooled, real))
        if tiles == TILES:
            torch.testing.assert_close(pooled, whole, atol=1e-5, rtol=1e-5)
        else:
            assert 1e-6 < away < without / 4


@torch.inference_mode()
def test_windows_of_one_patch_pool_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    padding_of.cache_clear()
    monkeypatch.setattr("trimming.tower.padding.POOLED_SIDE", SIDE)
    try:
        whole, pooled = (make_tower(None, way).encode(make_images(1)).features for way in ("all", "pooled"))
    finally:
        padding_of.cache_clear()
    torch.testing.assert_close(pooled, whole, atol=1e-5, rtol=1e-5)


# ---- half types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_do_not_round_what_is_added(dtype: torch.dtype) -> None:
    """Of 400 rows that are alike, one stands for 100: with log 100 rounded to bfloat16 its weight would be off by 1 %."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 80, generator=generator).to(dtype) for n in (5, 300, 300))
    bias = torch.zeros(1, 300)
    bias[:, ::3] = torch.tensor([100.0, 7.0]).log().repeat(50)
    wide = [t.double() for t in (query, key, value)]

    def off(found: Tensor, bias: Tensor | None) -> float:
        exact = weighed_attention(*wide, 80**-0.5, None if bias is None else bias.double())
        return float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact))

    weighed = off(weighed_attention(query, key, value, 80**-0.5, bias), bias)
    assert weighed < 1.05 * off(weighed_attention(query, key, value, 80**-0.5, None), None)
    if dtype == torch.bfloat16:
        mask = bias[:, None, None].expand(2, -1, 5, -1).to(dtype)
        assert weighed < 0.9 * off(F.scaled_dot_product_attention(query, key, value, mask, scale=80**-0.5), bias)
    # Equal keys: what counts is the weight alone.
    value = torch.zeros_like(value)
    value[:, :, 0] = 1
    weight = weighed_attention(query, torch.zeros_like(key), value, 1.0, bias)[..., 0].double()
    torch.testing.assert_close(weight, (100 / bias.double().exp().sum()).expand_as(weight), rtol=2**-8, atol=0)


@pytest.mark.parametrize("policy", [None, Alike(0.6)], ids=repr)
@torch.inference_mode()
def test_pooled_rows_do_not_drift_in_bfloat16(policy: TowerPolicy | None) -> None:
    """Against float32, they are off by what all rows are off by."""
    for tiles in (1, 2):
        images = make_images(tiles, 4)

        def drift(tower_tiles: TowerTiles, policy: TowerPolicy | None, images: list[Image] = images) -> float:
            half, exact = (make_tower(policy, tower_tiles, dtype).encode(images) for dtype in (torch.bfloat16, torch.float32))
            off = torch.linalg.norm(half.features.float() - exact.features, dim=(1, 2)) / torch.linalg.norm(
                exact.features, dim=(1, 2)
            )
            if half.group is not None and exact.group is not None:
                # Who merges with whom is decided by a hair at times: such images have no counterpart.
                off = off[(half.group == exact.group).all(-1)]
            return float(off.max())

        assert drift("pooled", policy) < 1.2 * drift("all", None)


# ---- behind the tower ---------------------------------------------------------------------------------------------------


def questions(rows: list[Row]) -> list[Prompt]:
    """Prompts about images of plain areas, of so many tiles each."""
    asked = []
    for number, prompt in enumerate(make_prompts(rows)):
        images = [make_images(len(image.pixels), number + 1)[-1] for image in prompt.images]
        images = [Image(f"{number}/{place}", image.pixels, image.ratio_id) for place, image in enumerate(images)]
        asked.append(Prompt(prompt.tokens, images, inputs_of(prompt.tokens, images)))
    return asked


BEHIND = [
    KeepAll(),
    TrimmedLlama(0.25),
    Clusters(keep=0.5),
    Clusters(likeness=0.9, policy=TrimmedLlama(0.3)),
    ElasticCache(0.5),
    SnapKV(0.5),
    VisionZip(0.5),
    ThinK(0.5),
    DivPrune(0.5),
]


@pytest.mark.parametrize("policy", BEHIND, ids=repr)
@pytest.mark.parametrize("tower_policy", [Alike(0.6), EViT(0.5), RandomRows(0.7)], ids=repr)
def test_every_policy_takes_what_the_tower_leaves(tower_policy: TowerPolicy, policy: Policy) -> None:
    """In the engine as under ``trim``, which says in its own words what a policy does with it."""
    model, asked = deep_model(), questions([Row((1,)), Row((4,), after=7), Row((2, 1), before=0), Row((3,)), Row(())])
    engine = make_engine(policy, model, tower_policy=tower_policy)
    logits = record_logits(engine)
    # trim seeds what is drawn by the row's id and the image's place.
    found = complete(engine, [prompt.request(str(number)) for number, prompt in enumerate(asked)])
    left = 0
    for number, (prompt, completion) in enumerate(zip(asked, found, strict=True)):
        alone = run_alone(model, prompt, str(number), policy, tower_tiles="pooled", tower_policy=tower_policy)
        assert completion.tokens == alone.tokens
        torch.testing.assert_close(torch.stack(logits[str(number)]), alone.logits, atol=1e-4, rtol=1e-4)
        mine, theirs = completion.trim, alone.trim
        for name in ("visual_tokens", "kept_visual_tokens", "cross_kv_bytes", "tower_keep_fraction"):
            assert getattr(mine, name) == getattr(theirs, name), name
        assert mine.kept.tolist() == theirs.kept.tolist()
        assert (mine.merged_into is None) == (theirs.merged_into is None)
        if mine.merged_into is not None:
            assert mine.merged_into.tolist() == theirs.merged_into.tolist()  # type: ignore[union-attr]
            assert set(mine.merged_into.tolist()) - {-1} == set(mine.kept.tolist())
        if prompt.images:
            assert mine.visual_tokens == sum(len(image.pixels) for image in prompt.images) * TOKENS
            assert mine.tower_keep_fraction == pytest.approx(tower_policy.keep, abs=0.05)
            left = max(left, mine.kept_visual_tokens / mine.visual_tokens)
            # Whatever layers choose for themselves, the tower's groups are one thing for all of them.
            assert mine.merged_into is not None
        else:
            assert mine.tower_keep_fraction is None
    assert left < tower_policy.keep


def test_trim_leaves_the_tower_as_it_was() -> None:
    model, (prompt,) = deep_model(), questions([Row((2,))])
    before = run_alone(model, prompt, "0", KeepAll())
    assert before.trim.tower_keep_fraction == 1
    other = run_alone(model, prompt, "0", KeepAll(), tower_policy=Alike(0.4))
    assert not torch.allclose(other.logits[0], before.logits[0], atol=1e-3)
    after = run_alone(model, prompt, "0", KeepAll())
    assert torch.equal(after.logits, before.logits)
    assert "forward" not in model.model.vision_model.__dict__
    # A row that stands for several is counted so by the text, too: otherwise the whole would be further away.
    unweighted = run_alone(model, prompt, "0", KeepAll(), tower_policy=Alike(0.4, weighted=False))
    away, further = (torch.linalg.norm(one.logits[0] - before.logits[0]) for one in (other, unweighted))
    assert away < further


def test_transformers_rows_want_every_padding_tile() -> None:
    for options in ({"tower_tiles": "pooled"}, {"tower_tiles": "real"}, {"tower_policy": Alike(0.5)}):
        with pytest.raises(ValueError, match='use rows="meta"'):
            make_engine(model=deep_model(), rows="transformers", **options)
        with pytest.raises(ValueError, match='use rows="meta"'), trim(deep_model(), KeepAll(), "transformers", **options):
            pass
    assert make_engine(model=deep_model(), rows="transformers").tower.tower_tiles == "all"
    assert make_engine(model=deep_model()).tower.tower_tiles == "pooled"
    with pytest.raises(ValueError, match="tower_tiles='some' is none of"), trim(deep_model(), KeepAll(), tower_tiles="some"):  # type: ignore[arg-type]
        pass


def test_questions_about_one_image_share_what_the_tower_leaves() -> None:
    """One pass through the tower, one segment, whichever policy comes next."""
    model, asked = deep_model(), questions([Row((3,))] * 3)
    asked = [Prompt(prompt.tokens, asked[0].images, inputs_of(prompt.tokens, asked[0].images)) for prompt in asked]
    engine = make_engine(KeepAll(), model, tower_policy=Alike(0.5))
    for policy in (KeepAll(), Clusters(keep=0.4), TrimmedLlama(0.3)):
        engine.use(policy)
        found = complete(engine, [prompt.request(str(number)) for number, prompt in enumerate(asked)])
        for number, (prompt, completion) in enumerate(zip(asked, found, strict=True)):
            alone = run_alone(model, prompt, str(number), policy, tower_tiles="pooled", tower_policy=Alike(0.5))
            assert completion.tokens == alone.tokens
    assert engine.statistics.images_encoded == 1


@pytest.mark.parametrize("options", [{"tower_tiles": "pooled"}, {"tower_policy": Alike(0.5)}], ids=str)
def test_trim_takes_pixels_as_a_processor_gives_them(options: dict[str, Any]) -> None:
    """In float32, whatever the model's type."""
    model, (prompt,) = deep_model(torch.bfloat16), questions([Row((2,))])
    assert prompt.inputs["pixel_values"].dtype == torch.float32
    alone = run_alone(model, prompt, "0", TrimmedLlama(0.3), **options)
    assert alone.logits.isfinite().all()


def test_trim_refuses_features_of_another_tower() -> None:
    model, (prompt,) = deep_model(), questions([Row((2,))])
    inputs = dict(prompt.inputs)
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    states = model.model.multi_modal_projector(model.model.vision_model(**pixels).last_hidden_state).flatten(0, 2)
    with trim(model, KeepAll(), tower_policy=Alike(0.5)), pytest.raises(ValueError, match="give pixel_values"):
        model(**inputs, cross_attention_states=states)


def test_without_a_mask_padding_tiles_are_no_features() -> None:
    model, (prompt,) = deep_model(), questions([Row((2,))])
    inputs = {name: value for name, value in prompt.inputs.items() if name != "cross_attention_mask"}
    for options, kept in (
        ({"tower_tiles": "pooled"}, 2 * TOKENS),
        ({"tower_policy": Alike(0.5)}, make_tower(Alike(0.5)).plan(2)[-1]),
    ):
        with torch.inference_mode(), trim(model, KeepAll(), **options) as trimmed:
            model(**inputs)
        assert (trimmed.samples[0].visual_tokens, trimmed.samples[0].kept_visual_tokens) == (2 * TOKENS, kept)


@pytest.mark.parametrize("kind", [ElasticCache, VisionZip])
def test_means_that_count_once_do_so_behind_a_tower_that_weighs(kind: Any) -> None:
    """Whether a policy counts what it merges is its own; what the tower merged counts either way."""
    model, (prompt,) = deep_model(), questions([Row((3,))])
    once, by_members = (
        run_alone(model, prompt, "0", kind(0.4, weighted=weighted), tower_policy=Alike(0.6)) for weighted in (False, True)
    )
    assert not torch.allclose(once.logits, by_members.logits, atol=1e-3)


@torch.inference_mode()
def test_states_that_overflow_end() -> None:
    """As others do: the row says what a model of NaN says."""
    images = [Image("0", torch.full((1, 3, TILE, TILE), torch.nan), 1)]
    for policy in POLICIES:
        assert make_tower(policy).encode(images).features.isnan().any()


@torch.inference_mode()
def test_small_shares_do_not_hang_on_neighbours() -> None:
    images, tower = make_images(4, 12), make_tower(RandomRows(0.2))
    together = tower.encode(images)
    for row, image in enumerate(images):
        assert torch.equal(tower.encode([image]).group[0], together.group[row])  # type: ignore[index]


@torch.inference_mode()
def test_sums_are_the_same_where_rows_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on a GPU, so that they are the same on every run."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 50, 7, generator=generator)
    into = torch.randint(-1, 9, (3, 50), generator=generator)
    torch.testing.assert_close(sorted_sums(rows, into, 9), sums_by(rows, into, 9), rtol=0, atol=0)
    none = torch.full((3, 50), -1)
    assert sorted_sums(rows, none, 2).abs().max() == 0


def test_a_tower_that_was_first_used_for_inference_can_be_trained() -> None:
    padding_of.cache_clear()
    with torch.inference_mode():
        make_tower().encode(make_images(1, 1))
    make_tower().encode(make_images(1, 1)).features.sum().backward()
    for parameter in deep_model().parameters():
        parameter.grad = None


def test_what_is_no_tower_policy_is_refused() -> None:
    for wrong in ("alike", Alike, TrimmedLlama(0.5)):
        with pytest.raises(TypeError, match="is no tower policy: give an instance"):
            make_engine(model=deep_model(), tower_policy=wrong)
        with pytest.raises(TypeError, match="is no tower policy"), trim(deep_model(), KeepAll(), tower_policy=wrong):
            pass
    assert make_engine(model=deep_model(), rows="transformers", tower_policy=Alike(1.0)).tower.policy is None


@pytest.mark.parametrize(
    "policy", [Grid(0.5), Random(0.5), Spread(0.5), FastV(0.5), ZipVL(0.9), WeightedFarthest(0.5)], ids=repr
)
def test_the_rest_of_the_family_takes_what_the_tower_leaves(policy: Policy) -> None:
    model, asked = deep_model(), questions([Row((1,)), Row((3, 2), after=5)])
    found = complete(make_engine(policy, model, tower_policy=Alike(0.5)), [p.request(str(n)) for n, p in enumerate(asked)])
    for number, (prompt, completion) in enumerate(zip(asked, found, strict=True)):
        alone = run_alone(model, prompt, str(number), policy, tower_tiles="pooled", tower_policy=Alike(0.5))
        assert completion.tokens == alone.tokens
        assert completion.trim.kept.tolist() == alone.trim.kept.tolist()
        left = sum(make_tower(Alike(0.5)).plan(len(image.pixels))[-1] for image in prompt.images)
        if not isinstance(policy, ZipVL):
            assert completion.trim.kept_visual_tokens == pytest.approx(left / 2, abs=1)
