"""The vision tower without masks, and what questions about one image share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from operations import Watch
from tiny import (
    IMAGE,
    RATIO_OF_TILES,
    TILE,
    TILES,
    TOKENS,
    Prompt,
    Row,
    complete,
    drain,
    inputs_of,
    lively_model,
    make_engine,
    make_prompts,
    record_logits,
    run_alone,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from trimming import Grid, KeepAll, Policy, Random, Rows, TrimmedLlama
from trimming.engine import Engine, Image
from trimming.engine.images import ImageCache
from trimming.engine.limits import Limit
from trimming.engine.sequence import Encoded
from trimming.tower import Encoding, Tower, TowerTiles

# Every arrangement of so many tiles: see the image processor's table of ratios.
RATIOS_OF_TILES = {1: [1], 2: [2, 5], 3: [3, 7], 4: [4, 6, 8]}


def make_images(tiles: int, count: int, seed: int = 0) -> list[Image]:
    generator = torch.Generator().manual_seed(seed)
    ratios = RATIOS_OF_TILES[tiles]
    return [
        Image(f"{tiles}/{i}", torch.randn(tiles, 3, TILE, TILE, generator=generator), ratios[i % len(ratios)])
        for i in range(count)
    ]


def make_tower(tower_tiles: TowerTiles = "all", keep_padding: bool = False) -> Tower:
    return Tower(lively_model(), lambda pixels: pixels, tower_tiles, keep_padding=keep_padding)


@torch.inference_mode()
def models_features(images: Sequence[Image]) -> Tensor:
    """(B, 4 tiles × tokens, text width) of transformers' tower and projector, its mask and all."""
    model = lively_model().model
    inputs = [inputs_of([IMAGE], [image]) for image in images]
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = model.vision_model(**{name: torch.cat([i[name] for i in inputs]) for name in names}).last_hidden_state
    features: Tensor = model.multi_modal_projector(states).flatten(1, 3)
    return features


# ---- the tower ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_padding", [False, True], ids=["real", "with-padding"])
@pytest.mark.parametrize("count", [1, 6], ids=["one-image", "six-images"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4], ids="{}-tiles".format)
def test_the_tower_is_exact(tiles: int, count: int, keep_padding: bool) -> None:
    images = make_images(tiles, count)
    wanted = models_features(images)
    with torch.inference_mode():
        found = make_tower(keep_padding=keep_padding).encode(images).features
    assert found.shape == (count, (TILES if keep_padding else tiles) * TOKENS, wanted.shape[-1])
    torch.testing.assert_close(found, wanted[:, : found.shape[1]], atol=1e-5, rtol=1e-5)
    # The oracle tells images, arrangements and tiles apart.
    assert F.pdist(wanted[:, : found.shape[1]].flatten(0, 1)).min() > 1e-2


def test_without_padding_tiles_the_tower_is_an_approximation() -> None:
    for tiles in (1, 2, 3, 4):
        images = make_images(tiles, 3)
        with torch.inference_mode():
            exact, real = make_tower().encode(images).features, make_tower("real").encode(images).features
        assert real.shape == exact.shape
        away = (torch.linalg.norm(real - exact) / torch.linalg.norm(exact)).item()
        if tiles == TILES:
            assert torch.equal(real, exact)
        else:
            assert 1e-3 < away < 0.5


def test_real_tiles_reach_the_answers() -> None:
    one, four = make_prompts([Row((1,)), Row((4,))])
    logits = []
    for tower_tiles in ("all", "real"):
        engine = make_engine(tower_tiles=tower_tiles)
        seen = record_logits(engine)
        complete(engine, [one.request("one"), four.request("four")])
        logits.append({id: rows[0] for id, rows in seen.items()})
    assert not torch.allclose(logits[0]["one"], logits[1]["one"], atol=1e-3)
    torch.testing.assert_close(logits[0]["four"], logits[1]["four"], atol=1e-5, rtol=1e-5)


def test_rows_that_look_at_padding_refuse_a_tower_without() -> None:
    with pytest.raises(ValueError, match='use rows="meta"'):
        make_engine(rows="transformers", tower_tiles="real")


def _noting(shapes: set[tuple[int, ...]]) -> Watch:
    """Notes the shapes of everything that is made, masks that an operator builds inside too."""
    return Watch(lambda func, args, out: shapes.update(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)))


@pytest.mark.parametrize("keep_padding", [False, True], ids=["real", "with-padding"])
@pytest.mark.parametrize("tiles", [1, 3, 4], ids="{}-tiles".format)
def test_the_tower_makes_no_mask(tiles: int, keep_padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []
    attention = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return attention(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    images = make_images(tiles, 3)
    shapes: set[tuple[int, ...]] = set()
    models_shapes: set[tuple[int, ...]] = set()
    with torch.inference_mode(), _noting(shapes):
        make_tower(keep_padding=keep_padding).encode(images)
    assert masks
    assert all(mask is None for mask in masks)
    with torch.inference_mode(), _noting(models_shapes):
        models_features(images)
    square = (TILES * -(-TOKENS // 8) * 8,) * 2
    assert square in {shape[-2:] for shape in models_shapes if len(shape) > 2}
    assert square not in {shape[-2:] for shape in shapes if len(shape) > 2}
    # Of no other size either, such as without each tile's fill.
    assert not [shape for shape in shapes if len(shape) == 4 and shape[-2] == shape[-1] > TOKENS and shape[1] != 3]


# ---- one image, many questions ------------------------------------------------------------------------------------------


def make_questions(count: int = 4, rows: Row = Row((3,)), seed: int = 0) -> list[Prompt]:  # noqa: B008 - frozen
    """Different texts about the same images."""
    prompts = make_prompts([rows] * count, seed)
    images = prompts[0].images
    return [Prompt(prompt.tokens, images, inputs_of(prompt.tokens, images)) for prompt in prompts]


def requests_of(prompts: Sequence[Prompt], new_tokens: int = 10) -> list[Any]:
    return [prompt.request(str(number), new_tokens) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.15), Random(0.4), Grid(0.5)], ids=repr)
def test_an_image_is_encoded_once_for_all_its_questions(policy: Policy, rows: Rows) -> None:
    asked = make_questions()
    sharing, apart = make_engine(policy, rows=rows), make_engine(policy, rows=rows, image_cache_bytes=0)
    found, wanted = record_logits(sharing), record_logits(apart)
    together, each = complete(sharing, requests_of(asked)), complete(apart, requests_of(asked))
    assert (sharing.statistics.images_encoded, sharing.statistics.image_hits) == (1, 3)
    assert (apart.statistics.images_encoded, apart.statistics.image_hits) == (4, 0)
    for number, (one, other) in enumerate(zip(together, each, strict=True)):
        alone = run_alone(lively_model(), asked[number], str(number), policy, rows)
        assert one.tokens == other.tokens == alone.tokens
        assert one.trim.kept.tolist() == other.trim.kept.tolist() == alone.trim.kept.tolist()
        for logits in (found, wanted):
            torch.testing.assert_close(torch.stack(logits[str(number)]), alone.logits, atol=1e-4, rtol=1e-4)
    # One that comes when all others have left finds the image still there.
    complete(sharing, requests_of(asked[:1]))
    assert (sharing.statistics.images_encoded, sharing.statistics.image_hits) == (1, 4)


def test_prompts_of_several_images_share_each_of_them() -> None:
    (both,) = make_prompts([Row((2, 1))])
    first, second = (make_prompts([Row((tiles,))], seed)[0] for seed, tiles in ((1, 2), (2, 1)))
    asked = [both] + [
        Prompt(p.tokens, [image], inputs_of(p.tokens, [image])) for p, image in zip((first, second), both.images, strict=True)
    ]
    engine = make_engine(TrimmedLlama(0.3))
    completions = complete(engine, requests_of(asked))
    assert (engine.statistics.images_encoded, engine.statistics.image_hits) == (2, 2)
    for number, (prompt, completion) in enumerate(zip(asked, completions, strict=True)):
        assert completion.tokens == run_alone(lively_model(), prompt, str(number), TrimmedLlama(0.3)).tokens


@pytest.mark.parametrize("limit", [0, 1, 1 << 30], ids=["no-cache", "full-cache", "cache"])
@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.3)], ids=repr)
def test_one_image_twice_in_a_prompt(policy: Policy, limit: int) -> None:
    """``full-cache`` has room for no image at all: who waits holds on to its own."""
    (prompt,) = make_prompts([Row((3, 3), after=0)])
    twice = [prompt.images[0]] * 2
    asked = Prompt(prompt.tokens, twice, inputs_of(prompt.tokens, twice))
    engine = make_engine(policy, image_cache_bytes=limit)
    (completion,) = complete(engine, requests_of([asked]))
    assert completion.tokens == run_alone(lively_model(), asked, "0", policy).tokens
    assert engine.statistics.images_encoded == (2 if limit <= 1 else 1)


def test_selection_stays_each_questions_own() -> None:
    asked = make_questions(6, Row((4,)))
    completions = complete(make_engine(TrimmedLlama(0.1)), requests_of(asked))
    kept = [completion.trim.kept.tolist() for completion in completions]
    assert len({tuple(one) for one in kept}) == len(asked)
    for number, prompt in enumerate(asked):
        assert kept[number] == run_alone(lively_model(), prompt, str(number), TrimmedLlama(0.1)).trim.kept.tolist()


def test_images_of_one_tile_count_go_through_the_tower_together() -> None:
    asked = make_prompts([Row((tiles,)) for tiles in (1, 4, 1, 2, 4, 1, 2, 1)])
    engine = make_engine()
    batches: list[list[int]] = []
    encode = engine.tower.encode

    def note(images: Sequence[Image]) -> Encoding:
        batches.append([len(image.pixels) for image in images])
        return encode(images)

    engine.tower.encode = note  # type: ignore[method-assign]
    completions = complete(engine, requests_of(asked))
    assert sorted(batches) == [[1] * 4, [2] * 2, [4] * 2]
    engine = make_engine()
    engine.tower_images = Limit(1)
    assert [c.tokens for c in complete(engine, requests_of(asked))] == [c.tokens for c in completions]


# ---- shared segments ----------------------------------------------------------------------------------------------------


def segment_of(engine: Engine, kept: int) -> int:
    cross, width = engine.geometry.cross_layers, engine.geometry.head_dim
    return engine.memory.segment_elements_for([kept] * cross, [width] * cross, [width] * cross)


@pytest.mark.parametrize(
    ("policy", "rows", "segments"),
    [
        (KeepAll(), "meta", 1),
        (Grid(0.5), "meta", 1),
        (Grid(0.5), "transformers", 1),
        (Random(0.5), "meta", 4),
        # Decoding does not see the padding tiles that the prefill has: not the whole kept set, which is what can be shared.
        (KeepAll(), "transformers", 4),
    ],
    ids=str,
)
def test_questions_that_keep_the_same_share_one_segment(policy: Policy, rows: Rows, segments: int) -> None:
    asked = make_questions()
    engine = make_engine(policy, rows=rows)
    futures = [engine.submit(request) for request in requests_of(asked)]
    engine.step()
    kept = 3 * TOKENS if isinstance(policy, KeepAll) else 3 * TOKENS // 2
    assert len(engine.decode.running) == 4
    assert engine.memory.segment_elements == segments * segment_of(engine, kept)
    users = [s.segment.users for s in engine.decode.running if s.segment is not None]
    assert users == [4 // segments] * 4
    drain(engine)
    for number, future in enumerate(futures):
        assert future.result().tokens == run_alone(lively_model(), asked[number], str(number), policy, rows).tokens


@pytest.mark.parametrize("policy", [KeepAll(), Grid(0.5), TrimmedLlama(1.0)], ids=repr)
def test_a_later_question_uses_the_segment_that_is_there(policy: Policy) -> None:
    """Nothing is projected for it, and the segment outlives the question that made it."""
    asked = make_questions(3)
    engine = make_engine(policy)
    logits = record_logits(engine)
    projected: list[int] = []
    layers = lively_model().model.language_model.layers
    hooks = [
        layers[i].cross_attn.k_proj.register_forward_pre_hook(lambda _, args: projected.append(len(args[0])))
        for i in lively_model().config.text_config.cross_attention_layers
    ]
    try:
        futures = [engine.submit(asked[0].request("0", 3))]
        engine.step()
        assert len(projected) == 3
        futures.append(engine.submit(asked[1].request("1", 10)))
        engine.step()
        assert futures[0].done()
        futures.append(engine.submit(asked[2].request("2", 10)))
        engine.step()
        assert engine.memory.segment_elements == segment_of(engine, len(futures[0].result().trim.kept))
        assert len(engine.memory.shared) == 1
        # What decides behind the first layer has to look at all of it there.
        assert len(projected) == 3 + 2 * (policy.where == "first_layer")
    finally:
        for hook in hooks:
            hook.remove()
    drain(engine)
    for number, future in enumerate(futures):
        alone = run_alone(lively_model(), asked[number], str(number), policy)
        length = len(future.result().tokens)
        assert future.result().tokens == alone.tokens[:length]
        torch.testing.assert_close(torch.stack(logits[str(number)]), alone.logits[:length], atol=1e-4, rtol=1e-4)
        assert future.result().trim.kept.tolist() == alone.trim.kept.tolist()


def test_what_is_shared_survives_failures(caplog: pytest.LogCaptureFixture) -> None:
    """Memory runs out in prefills and in steps of more than two: segments are found, left and found again."""
    asked = make_questions(6)
    wanted = complete(make_engine(), requests_of(asked))
    engine = make_engine()
    cross, own = engine.prefill._cross_layer, engine.decode._self_layer

    def cross_layer(layer: Any, index: int, batch: Any, *rest: Any) -> Any:
        if index == 1 and len(batch.sequences) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cross(layer, index, batch, *rest)

    def self_layer(layer: Any, index: int, states: Tensor, *rest: Any) -> Any:
        if index == 2 and len(states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(layer, index, states, *rest)

    engine.prefill._cross_layer = cross_layer  # type: ignore[method-assign]
    engine.decode._self_layer = self_layer  # type: ignore[method-assign]
    completions = complete(engine, requests_of(asked))
    assert [c.tokens for c in completions] == [c.tokens for c in wanted]
    assert (engine.max_sequences.now, engine.prefill_sequences.now, len(caplog.records)) == (1, 1, 1)


# ---- the cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spare", "encodings", "hits"), [(0, 6, 2), (-4, 7, 1)], ids=["two-images", "barely-one"])
def test_the_image_cache_is_bounded(spare: int, encodings: int, hits: int) -> None:
    """Room for some of three images: they are encoded again, and nothing else changes."""
    asked = make_prompts([Row((4,))] * 3)
    order = [asked[i] for i in (0, 1, 2, 0, 1, 2, 2, 1)]
    limit = 2 * 4 * TOKENS * 64 * 4 + spare  # features of two images
    roomy, tight = make_engine(TrimmedLlama(0.3)), make_engine(TrimmedLlama(0.3), max_sequences=1, image_cache_bytes=limit)
    tight.prefill_sequences = tight.tower_images = Limit(1)
    requests = [prompt.request(str(number), 3) for number, prompt in enumerate(order)]
    wanted = complete(roomy, requests)
    futures = [tight.submit(request) for request in requests]

    def within_the_limit() -> None:
        # Who runs has no more use for images.
        assert not any(sequence.group.encoded for sequence in tight.decode.running)
        assert sum(image.bytes for image in tight.images._images.values()) <= limit

    drain(tight, within_the_limit)
    assert [future.result().tokens for future in futures] == [completion.tokens for completion in wanted]
    assert roomy.statistics.images_encoded == 3
    # The longest unused one goes: of 0 1 2 0 1 2 2 1 only the last two find theirs, or the last but one alone.
    assert (tight.statistics.images_encoded, tight.statistics.image_hits) == (encodings, hits)


def test_a_cached_image_holds_on_to_nothing_else() -> None:
    """Neither to the others that went through the tower with it nor to those of its prefill."""
    engine = make_engine(TrimmedLlama(0.3))
    complete(engine, requests_of(make_prompts([Row((2,))] * 4)))
    for image in engine.images._images.values():
        assert image.features.untyped_storage().nbytes() == image.features.nbytes == image.bytes
    assert len(engine.images._images) == 4


def encoded(rows: int) -> Encoded:
    """An image of ``rows`` × 4 bytes."""
    return Encoded(1, torch.zeros(rows, 1))


def test_the_longest_unused_image_goes_first() -> None:
    cache = ImageCache(100)
    images = {key: encoded(10) for key in "abc"}
    cache.put("a", images["a"])
    cache.put("b", images["b"])
    assert cache.get("a") is images["a"]
    cache.put("c", images["c"])
    assert cache.get("b") is None
    assert cache.get("a") is images["a"]
    assert cache.get("c") is images["c"]
    cache.put("b", images["b"])
    assert cache.get("a") is None
    cache.put("c", again := encoded(10))
    assert cache.get("c") is again


def test_an_image_over_the_limit_is_not_kept() -> None:
    cache = ImageCache(100)
    cache.put("small", encoded(1))
    cache.put("large", encoded(30))
    assert cache.get("large") is None
    cache.put("small", small := encoded(25))
    assert cache.get("small") is small


def test_tile_counts_and_ratios_are_the_processors() -> None:
    assert all(RATIO_OF_TILES[tiles] in ratios for tiles, ratios in RATIOS_OF_TILES.items())


@pytest.mark.parametrize("policy", [TrimmedLlama(0.2), Grid(0.5), Random(0.3)], ids=repr)
def test_another_policy_finds_the_images_encoded(policy: Policy) -> None:
    asked = make_prompts([Row((1,)), Row((4,)), Row((2, 1))])
    engine = make_engine(KeepAll())
    complete(engine, requests_of(asked))
    engine.use(policy)
    found = complete(engine, requests_of(asked))
    wanted = complete(make_engine(policy), requests_of(asked))
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert [c.trim.kept.tolist() for c in found] == [c.trim.kept.tolist() for c in wanted]
    assert (engine.statistics.images_encoded, engine.statistics.image_hits) == (4, 4)


def test_a_policy_changes_for_nobody_under_way() -> None:
    engine = make_engine(KeepAll())
    future = engine.submit(make_prompts([Row((1,))])[0].request("0", 3))
    with pytest.raises(RuntimeError, match="while requests wait or run"):
        engine.use(Grid(0.5))
    engine.step()
    with pytest.raises(RuntimeError, match="while requests wait or run"):
        engine.use(Grid(0.5))
    drain(engine)
    engine.use(Grid(0.5))
    assert len(future.result().trim.kept) == TOKENS
