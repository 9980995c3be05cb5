"""Clusters of an image's features: who belongs together, what stands for them, and how often it counts."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from operations import Watch
from tiny import (
    BATCHES,
    TILES,
    TOKENS,
    Prompt,
    Row,
    complete,
    lively_model,
    make_engine,
    make_prompts,
    record_logits,
    run_alone,
)
from torch import Tensor

from trimming import Clusters, KeepAll, Policy, ThinK
from trimming.clustering import NEIGHBOURS, Clustering, merge_clusters
from trimming.policies import ElasticCache, TrimmedLlama
from trimming.tower import Encoding

SHARE, LIKE = Clustering(keep=0.3), Clustering(likeness=0.6)


def alike(seed: int, count: int = 30, width: int = 6, groups: int = 5) -> Tensor:
    """(count, width) around a few points, some of them nearer to each other than others."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(groups, width, generator=generator)
    spread = 0.1 + torch.rand(count, 1, generator=generator)
    return points[torch.arange(count) % groups] + spread * torch.randn(count, width, generator=generator)


def by_hand(features: list[list[float]], keep: float | None, likeness: float | None) -> list[int]:
    """Density peaks in plain Python."""
    count = len(features)

    def distance(a: list[float], b: list[float]) -> float:
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        return 1 - dot / math.hypot(*a) / math.hypot(*b)

    far = [[distance(a, b) for b in features] for a in features]
    crowded = [math.fsum(sorted(row)[:NEIGHBOURS]) / min(NEIGHBOURS, count) for row in far]
    denser = [[j for j in range(count) if (crowded[j], j) < (crowded[i], i)] for i in range(count)]
    apart = [min((far[i][j] for j in denser[i]), default=math.inf) for i in range(count)]
    if keep is not None:
        worth = [a * math.exp(-c) for a, c in zip(apart, crowded, strict=True)]
        centres = sorted(sorted(range(count), key=lambda i: -worth[i])[: max(1, round(keep * count))])
    else:
        assert likeness is not None
        centres = []
        for i in sorted(range(count), key=lambda i: (crowded[i], i)):
            if all(far[i][c] > 1 - likeness for c in centres):
                centres.append(i)
        centres.sort()
    nearest = [min(centres, key=lambda c: far[i][c]) for i in range(count)]
    order = list(dict.fromkeys(nearest))
    return [order.index(c) for c in nearest]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("clustering", [SHARE, LIKE, Clustering(keep=0.01), Clustering(likeness=0.95)], ids=repr)
def test_density_peaks_by_hand(clustering: Clustering, seed: int) -> None:
    features = alike(seed)
    found = clustering(features[None])[0].tolist()
    assert found == by_hand(features.double().tolist(), clustering.keep, clustering.likeness)


def test_of_equals_the_first_come_first() -> None:
    """All as far from each other: places decide."""
    features = torch.eye(12)
    for clustering in (Clustering(keep=0.5), Clustering(likeness=0.5)):
        found = clustering(features[None])[0].tolist()
        assert found == by_hand(features.tolist(), clustering.keep, clustering.likeness)


@pytest.mark.parametrize("likeness", [0.7, 0.9, 0.99])
def test_whoever_joins_is_so_alike_to_the_centre(likeness: float) -> None:
    """Also in chains, whose neighbours are all alike and whose ends are not, and longer than the rounds last."""
    for count in (100, 400):
        angles = torch.linspace(0, 1, count) ** 2 * math.pi / 2
        chain = torch.stack([angles.cos(), angles.sin()], -1)
        for features in (chain, *(alike(seed, count) for seed in range(3))):
            cluster = Clustering(likeness=likeness)(features[None])[0]
            unit = torch.nn.functional.normalize(features, dim=-1)
            for number in range(int(cluster.max()) + 1):
                own = unit[cluster == number]
                # One of them, the centre, is as alike to all.
                assert ((own @ own.T).amin(-1) >= likeness - 1e-6).any()
            if features is chain:
                assert 1 < len(cluster.unique()) < count / 3


@pytest.mark.parametrize("clustering", [SHARE, LIKE], ids=repr)
def test_an_image_alone_decides(clustering: Clustering) -> None:
    images = torch.stack([alike(seed) for seed in range(5)])
    together = clustering(images)
    for image, own in zip(images, together, strict=True):
        assert clustering(image[None])[0].equal(own)


def test_a_share_is_of_the_images_own_features() -> None:
    features = alike(0, count=41)[None]
    for keep, wanted in ((0.01, 1), (0.1, 4), (0.5, 20), (0.9, 37), (1.0, 41)):
        assert int(Clustering(keep=keep)(features).max()) + 1 == wanted


def test_the_more_alike_the_fewer_clusters() -> None:
    features = alike(0)[None]
    counts = [int(Clustering(likeness=likeness)(features).max()) + 1 for likeness in (0.2, 0.5, 0.8, 0.95, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < 10 < counts[-1]
    flat = features[:, :1].expand(-1, 30, -1)
    assert Clustering(likeness=0.99)(flat).max() == 0


@pytest.mark.parametrize("given", [{}, {"keep": 0.5, "likeness": 0.5}, {"keep": 0.0}, {"likeness": 1.5}], ids=str)
def test_bad_settings_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"(keep|likeness)="):
        Clusters(**given)


def test_features_are_clustered_once() -> None:
    with pytest.raises(ValueError, match="once"):
        Clusters(0.5, policy=Clusters(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_and_sizes_by_hand(dtype: torch.dtype) -> None:
    images = torch.stack([alike(seed) for seed in range(3)]).to(dtype)
    clusters = SHARE(images)
    for image, cluster, found in zip(images, clusters.tolist(), merge_clusters(images, clusters), strict=True):
        assert found.features.dtype == dtype
        assert found.cluster.tolist() == cluster
        members = [[i for i, c in enumerate(cluster) if c == number] for number in range(max(cluster) + 1)]
        assert found.sizes.tolist() == list(map(len, members))
        assert found.places.tolist() == [own[0] for own in members] == sorted(found.places.tolist())
        for own, mean in zip(members, found.features, strict=True):
            columns = zip(*(image[i].float().tolist() for i in own), strict=True)
            wanted = [math.fsum(column) / len(own) for column in columns]
            torch.testing.assert_close(mean, torch.tensor(wanted).to(dtype))


# ---- the oracle -------------------------------------------------------------------------------------------------------------


def copied(features: Tensor, tiles: Tensor, clustering: Clustering) -> Tensor:
    """(images, tiles, tokens, width) with every real tile's feature replaced by its cluster's mean. ``tiles`` (images,)."""
    out = features.clone()
    for image, count in zip(out, tiles.tolist(), strict=True):
        own = image[:count].flatten(0, 1)
        (found,) = merge_clusters(own[None], clustering(own[None]))
        image[:count] = found.features[found.cluster].view_as(image[:count])
    return out


def model_that_sees_copies(clustering: Clustering) -> Any:
    """transformers' model, whose projector gives every member of a cluster its mean."""
    model = copy.deepcopy(lively_model())
    tiles: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        tiles[:] = [kwargs["aspect_ratio_mask"].flatten(0, 1).sum(-1)]

    def copy_means(module: Any, args: Any, out: Tensor) -> Tensor:
        return copied(out.view(len(tiles[0]), TILES, TOKENS, -1), tiles[0], clustering).view_as(out)

    model.model.vision_model.register_forward_pre_hook(note, with_kwargs=True)
    model.model.multi_modal_projector.register_forward_hook(copy_means)
    return model


@pytest.mark.parametrize("slices", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("clustering", [SHARE, LIKE, Clustering(keep=0.1)], ids=repr)
@pytest.mark.parametrize("batch", ["mixed tiles", "several images", "adjacent images", "text-only among images"])
def test_means_that_count_as_often_as_they_have_members_are_as_good_as_copies(
    batch: str, clustering: Clustering, slices: bool
) -> None:
    """Prefill and 16 steps, in the engine and under ``trim``."""
    prompts, model = make_prompts(BATCHES[batch]), model_that_sees_copies(clustering)
    policy: Policy = Clusters(clustering.keep, clustering.likeness)
    seeing: Policy = KeepAll()
    if slices:
        policy, seeing = ThinK(0.5, policy), ThinK(0.5)
    engine = make_engine(policy)
    logits = record_logits(engine)
    found = complete(engine, [p.request(str(i), 17) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        wanted = run_alone(model, prompt, str(i), seeing, "meta", 17)
        trimmed = run_alone(lively_model(), prompt, str(i), policy, "meta", 17)
        for tokens, mine in ((found[i].tokens, torch.stack(logits[str(i)])), (trimmed.tokens, trimmed.logits)):
            assert tokens == wanted.tokens
            torch.testing.assert_close(mine, wanted.logits, atol=1e-5, rtol=1e-5)


def test_without_weights_they_are_not() -> None:
    """The oracle would see it."""
    prompt = make_prompts(BATCHES["four tiles"])[0]
    wanted = run_alone(model_that_sees_copies(SHARE), prompt, "0", KeepAll(), "meta", 4)

    class Unweighed(Clusters):
        weighs = False

    other = complete(make_engine(Unweighed(0.3)), [prompt.request("0", 4)])
    engine = make_engine(Unweighed(0.3))
    logits = record_logits(engine)
    complete(engine, [prompt.request("0", 4)])
    assert other
    assert (torch.stack(logits["0"])[0] - wanted.logits[0]).abs().max() > 1e-2


# ---- in the machine ---------------------------------------------------------------------------------------------------------


def test_padding_never_joins() -> None:
    """An image of one tile has the clusters that it has by itself, whatever lies in its padding tiles."""
    for rows in ("meta", "transformers"):
        engine = make_engine(Clusters(0.3), rows=rows)  # type: ignore[arg-type]
        prompt = make_prompts(BATCHES["one tile"])[0]
        (completion,) = complete(engine, [prompt.request("0", 2)])
        assert completion.trim.visual_tokens == TOKENS
        assert completion.trim.kept_visual_tokens == 3
        assert completion.trim.merged_into is not None
        assert completion.trim.merged_into[TOKENS:].eq(-1).all()
        assert set(completion.trim.merged_into[:TOKENS].tolist()) == set(completion.trim.kept.tolist())


def test_the_image_cache_holds_what_is_left() -> None:
    prompts = make_prompts(BATCHES["mixed tiles"])
    sizes = {}
    for policy in (KeepAll(), Clusters(0.1)):
        engine = make_engine(policy)
        complete(engine, [p.request(str(i), 2) for i, p in enumerate(prompts)])
        sizes[policy] = sum(image.bytes for image in engine.images._images.values())
    assert sizes[Clusters(0.1)] == 0.1 * sizes[KeepAll()]


def test_engines_that_share_a_cache_take_from_it_what_they_can() -> None:
    """What is there with all features is merged again; what others merged is of no use."""
    asked = [p.request(str(i), 4) for i, p in enumerate(make_prompts(BATCHES["mixed tiles"]))]
    whole, merging, other = make_engine(KeepAll()), make_engine(Clusters(0.3)), make_engine(Clusters(0.5))
    wanted = [complete(make_engine(policy), asked) for policy in (KeepAll(), Clusters(0.3), Clusters(0.5))]
    merging.images = other.images = whole.images
    for engine, said in zip((whole, merging, other), wanted, strict=True):
        assert [c.tokens for c in complete(engine, asked)] == [c.tokens for c in said]
    assert (whole.statistics.images_encoded, merging.statistics.images_encoded, other.statistics.images_encoded) == (4, 0, 0)
    merging.images.clear()
    for engine, said in ((merging, wanted[1]), (other, wanted[2]), (whole, wanted[0])):
        assert [c.tokens for c in complete(engine, asked)] == [c.tokens for c in said]
        assert engine.statistics.images_encoded % 4 == 0
        assert engine.statistics.images_encoded


def test_a_policy_may_follow_another() -> None:
    asked = [p.request(str(i), 4) for i, p in enumerate(make_prompts(BATCHES["mixed tiles"]))]
    engine = make_engine(KeepAll())
    for policy in (
        KeepAll(),
        Clusters(0.3),
        ElasticCache(0.4, weighted=True),
        Clusters(0.3, policy=TrimmedLlama(0.3)),
        KeepAll(),
    ):
        engine.use(policy)
        assert [c.tokens for c in complete(engine, asked)] == [c.tokens for c in complete(make_engine(policy), asked)]


def test_nothing_waits_for_the_device_while_features_are_clustered() -> None:
    """Whatever n is, as many calls; but for the number of clusters, which tells their sizes."""
    seen: list[str] = []
    calls = []
    for count in (20, 200):
        seen.clear()
        features = alike(0, count)[None].expand(3, -1, -1)
        for clustering in (SHARE, LIKE):
            with Watch(lambda func, args, out: seen.append(str(func))):
                merge_clusters(features, clustering(features))
        assert not {name for name in seen if "item" in name or "local_scalar" in name or "nonzero" in name}
        calls.append(len(seen))
    assert calls[0] == calls[1]


def test_a_decision_over_other_clusters_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA an image that is encoded again, in another batch, may come out a hair otherwise, and be clustered otherwise."""
    image = make_prompts(BATCHES["four tiles"])[0].images
    asked = [Prompt([3 + i, 64, 7, 8], image, {}).request(str(i), 6) for i in range(3)]
    policy = Clusters(0.4, policy=TrimmedLlama(0.3))
    engine = make_engine(policy, image_cache_bytes=0)
    engine.submit_together(asked)
    engine.step()
    running = list(engine.decode.running)
    # Out of memory: two are sent back, and their image is encoded again.
    with torch.inference_mode():
        engine._preempt(running[1:])
    for sequence in running:
        sequence.group.encoded = []
    nudge = 0.2 * torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    encode = engine.tower.encode

    def nudged(images: Any) -> Encoding:
        found = encode(images)
        return replace(found, features=found.features + nudge)

    monkeypatch.setattr(engine.tower, "encode", nudged)
    while not all(sequence.future.done() for sequence in running):
        engine.step()
    first, *again = [sequence.future.result().trim for sequence in running]
    assert first.merged_into is not None
    for trim in again:
        assert trim.merged_into is not None
        assert trim.merged_into.tolist() != first.merged_into.tolist()
        # Whatever was decided over, each feature of the image is in one that stayed, or in none.
        assert set(trim.merged_into.tolist()) - {-1} == set(trim.kept.tolist())
        assert len(trim.kept) == trim.kept_visual_tokens


def test_how_much_is_left_is_known_once_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that merge to next to nothing do not lead to a prefill of all features of those behind."""
    monkeypatch.setattr("trimming.engine.scheduler.PREFILL_VISUAL_TOKENS", 100)
    prompts = make_prompts([Row((4,))] * 12)
    wanted = complete(make_engine(Clusters(0.9)), [p.request(str(i), 2) for i, p in enumerate(prompts)])
    engine = make_engine(Clusters(0.9))
    engine._left = 0.01
    sizes, inner = [], engine.prefill

    def prefill(batch: Any) -> Tensor:
        sizes.append(len(batch))
        return inner(batch)

    engine.prefill = prefill  # type: ignore[assignment]
    found = complete(engine, [p.request(str(i), 2) for i, p in enumerate(prompts)])
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert max(sizes) <= 2
