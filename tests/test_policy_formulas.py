"""Every policy against its paper's formula in plain Python: lists, loops and ``math``, no tensors in what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from operations import Largest, Watch

from trimming import (
    DivPrune,
    ElasticCache,
    FastV,
    KeepAll,
    Policy,
    SnapKV,
    ThinK,
    TrimmedLlama,
    VisionZip,
    VisualContext,
    WeightedFarthest,
    ZipVL,
)
from trimming.selection import farthest_points, merged, nearest_distances, unit_rows

IMAGES, TILES, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 3, 10, 4, 2, 6
ONE_IMAGE = TILES * TOKENS
# Real tiles of each image: two images, one that fills its tiles, one of a single tile, and a text without any.
BATCH = [(1, 3), (3, 0), (1, 0), (0, 0)]
Numbers = list[float]


def make_context(seed: int, ties: bool) -> VisualContext:
    """What is not valid is garbage. With ``ties`` every score, and every cosine, has many equals, and is exact in binary."""
    chance = torch.Generator().manual_seed(seed)
    places = torch.arange(IMAGES * ONE_IMAGE)
    valid = torch.stack([places % ONE_IMAGE < torch.tensor(tiles)[places // ONE_IMAGE] * TOKENS for tiles in BATCH])

    def scores(*shape: int) -> torch.Tensor:
        drawn = torch.randint(0, 4, shape, generator=chance) / 4 if ties else torch.rand(shape, generator=chance)
        return drawn.masked_fill(~valid.view(len(BATCH), *(1,) * (len(shape) - 2), -1), 9.0)

    features = torch.randn(len(BATCH), len(places), WIDTH, generator=chance)
    if ties:
        features = torch.eye(WIDTH)[torch.randint(0, WIDTH, features.shape[:2], generator=chance)] * 2
    features[~valid] = torch.nan
    return VisualContext(
        valid=valid,
        images=IMAGES,
        tiles=TILES,
        tokens=TOKENS,
        sample_ids=tuple(map(str, range(len(BATCH)))),
        kv_heads=KV_HEADS,
        attention=scores(len(BATCH), HEADS, len(places)),
        recent=scores(len(BATCH), HEADS, len(places)),
        features=features,
        class_attention=scores(len(BATCH), len(places)),
    )


# ---- what all of them share, in plain Python ----------------------------------------------------------------------------


def count_of(share: float, places: Sequence[int]) -> int:
    return max(1, round(share * len(places))) if places else 0


def best(scores: Numbers, places: Sequence[int], count: int) -> list[int]:
    return sorted(places, key=lambda p: (-scores[p], p))[:count]


def by_image(places: Sequence[int]) -> list[list[int]]:
    return [[p for p in places if p // ONE_IMAGE == image] for image in range(IMAGES)]


def with_every_image(kept: Sequence[int], scores: Numbers, places: Sequence[int]) -> set[int]:
    """An image that would lose everything keeps its best feature."""
    lost = [own for own in by_image(places) if own and not set(own) & set(kept)]
    return {*kept, *(best(scores, own, 1)[0] for own in lost)}


def cosine(a: Numbers, b: Numbers) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def over_heads(heads: list[Numbers]) -> Numbers:
    return [math.fsum(column) for column in zip(*heads, strict=True)]


class Sample:
    """One sample of a context, as lists."""

    def __init__(self, context: VisualContext, row: int) -> None:
        def listed(t: torch.Tensor | None) -> Any:
            assert t is not None
            return t[row].tolist()

        self.places = [p for p, there in enumerate(context.valid[row].tolist()) if there]
        self.attention, self.recent = listed(context.attention), listed(context.recent)
        self.features, self.classes = listed(context.features), listed(context.class_attention)


CONTEXTS = pytest.mark.parametrize(("seed", "ties"), [(s, t) for s in range(4) for t in (False, True)])
SHARES = pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])


def each(policy: Policy, seed: int, ties: bool) -> list[tuple[Sample, set[int]]]:
    """Every sample, with the positions that the policy keeps of it in the batch."""
    context = make_context(seed, ties)
    keep = policy.select(context)
    assert keep.shape == context.valid.shape
    return [(Sample(context, row), set(keep[row].nonzero()[:, 0].tolist())) for row in range(len(BATCH))]


# ---- the formulas -------------------------------------------------------------------------------------------------------


@CONTEXTS
@SHARES
def test_fastv_keeps_what_the_last_row_looks_at(seed: int, ties: bool, share: float) -> None:
    assert FastV.recent_rows == 1
    for sample, kept in each(FastV(share), seed, ties):
        scores = [total / HEADS for total in over_heads(sample.recent)]
        wanted = best(scores, sample.places, count_of(share, sample.places))
        assert kept == with_every_image(wanted, scores, sample.places)


@CONTEXTS
@pytest.mark.parametrize("mass", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_zipvl_keeps_the_fewest_that_hold_the_mass(seed: int, ties: bool, mass: float) -> None:
    for sample, kept in each(ZipVL(mass), seed, ties):
        scores = [total / HEADS for total in over_heads(sample.attention)]
        ranked = best(scores, sample.places, len(sample.places))
        whole = math.fsum(scores[p] for p in sample.places)
        counts = range(min(1, len(ranked)), len(ranked) + 1)
        enough = [n for n in counts if math.fsum(scores[p] for p in ranked[:n]) >= mass * whole - 1e-9]
        # The whole mass is everything, what nobody looks at too.
        count = len(ranked) if mass == 1 else enough[0]
        assert kept == with_every_image(ranked[:count], scores, sample.places)


@CONTEXTS
@SHARES
def test_snapkv_keeps_what_each_head_of_keys_looked_at_last(seed: int, ties: bool, share: float) -> None:
    context = make_context(seed, ties)
    keep = SnapKV(share).select(context)
    assert keep.shape == (len(BATCH), KV_HEADS, IMAGES * ONE_IMAGE)
    for row in range(len(BATCH)):
        sample = Sample(context, row)
        for head in range(KV_HEADS):
            group = HEADS // KV_HEADS
            scores = over_heads(sample.recent[head * group : (head + 1) * group])
            wanted = [p for own in by_image(sample.places) for p in best(scores, own, count_of(share, own))]
            assert keep[row, head].nonzero()[:, 0].tolist() == sorted(wanted)


@CONTEXTS
@SHARES
def test_elastic_cache_merges_into_the_nearest_anchor(seed: int, ties: bool, share: float) -> None:
    policy, context = ElasticCache(share), make_context(seed, ties)
    targets = policy.merge(policy.select(context), context)
    for row, (sample, kept) in enumerate(each(policy, seed, ties)):
        scores = over_heads(sample.attention)
        wanted = best(scores, sample.places, count_of(share, sample.places))
        assert kept == with_every_image(wanted, scores, sample.places)
        goes: dict[int, int] = {}
        for own in by_image(sample.places):
            anchors = [p for p in own if p in kept]
            goes |= {p: min(anchors, key=lambda a: (abs(a - p), a)) for p in own if p not in kept}
        assert targets[row].tolist() == [goes.get(p, -1) for p in range(IMAGES * ONE_IMAGE)]


@CONTEXTS
@SHARES
def test_divprune_solves_max_min_diversity_greedily(seed: int, ties: bool, share: float) -> None:
    for sample, kept in each(DivPrune(share), seed, ties):
        features, places = sample.features, sample.places

        def apart(p: int, others: Sequence[int], features: Any = features) -> float:
            return min((1 - cosine(features[p], features[o]) for o in others if o != p), default=math.inf)

        wanted: list[int] = []
        while len(wanted) < count_of(share, places):
            left = [p for p in places if p not in wanted]
            wanted.append(max(left, key=lambda p: (apart(p, wanted or places), -p)))
        assert kept == with_every_image(wanted, [0.0] * len(features), places)


@CONTEXTS
@SHARES
def test_weighted_farthest_multiplies_distance_and_attention(seed: int, ties: bool, share: float) -> None:
    for sample, kept in each(WeightedFarthest(share), seed, ties):
        features, places = sample.features, sample.places
        weights = [total / HEADS for total in over_heads(sample.attention)]

        def worth(p: int, chosen: Sequence[int], weights: Numbers = weights, features: Any = features) -> float:
            return weights[p] * min((1 - cosine(features[p], features[c]) for c in chosen), default=1.0)

        wanted: list[int] = []
        while len(wanted) < count_of(share, places):
            left = [p for p in places if p not in wanted]
            wanted.append(max(left, key=lambda p: (worth(p, wanted), -p)))
        assert kept == with_every_image(wanted, weights, places)


@CONTEXTS
@SHARES
def test_visionzip_keeps_dominant_and_contextual_features(seed: int, ties: bool, share: float) -> None:
    policy, context = VisionZip(share), make_context(seed, ties)
    targets = policy.merge(policy.select(context), context)
    for row, (sample, kept) in enumerate(each(policy, seed, ties)):
        count = count_of(share, sample.places)
        contextual = round(count * 10 / 64)
        dominant = best(sample.classes, sample.places, count - contextual)
        rest = [p for p in sample.places if p not in dominant]
        even = [rest[i * len(rest) // contextual] for i in range(contextual)]
        assert kept == with_every_image([*dominant, *even], sample.classes, sample.places)
        goes: dict[int, int] = {}
        for own in by_image(sample.places):
            into = [p for p in own if p in kept and p not in dominant]
            for p in (p for p in own if p not in kept and into):
                goes[p] = max(into, key=lambda c: (cosine(sample.features[p], sample.features[c]), -c))
        assert targets[row].tolist() == [goes.get(p, -1) for p in range(IMAGES * ONE_IMAGE)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_think_keeps_the_channels_with_the_largest_products(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    query, key = torch.randn(KV_HEADS, 5, 16), torch.randn(KV_HEADS, 7, 16)
    # A channel that is another's equal.
    query[..., 9], key[..., 9] = query[..., 4], key[..., 4]
    policy = ThinK(share)
    found = policy.channels(query, key).tolist()
    for head in range(KV_HEADS):
        q, k = query[head].tolist(), key[head].tolist()
        norms = [math.sqrt(math.fsum((a[i] * b[i]) ** 2 for a in q for b in k)) for i in range(16)]
        assert found[head] == sorted(best([round(n, 4) for n in norms], range(16), max(1, round(share * 16))))
        assert policy.key_width(16) == len(found[head])


@pytest.mark.parametrize("inner", [KeepAll(), TrimmedLlama(0.3), SnapKV(0.4), VisionZip(0.5), ElasticCache(0.2)], ids=repr)
def test_think_leaves_features_to_another_policy(inner: Policy) -> None:
    context, policy = make_context(0, False), ThinK(0.5, inner)
    kept = policy.select(context)
    assert torch.equal(kept, inner.select(context))
    names = ("where", "looks_at", "recent_rows", "merges")
    assert [getattr(policy, n) for n in names] == [getattr(inner, n) for n in names]
    if inner.merges:
        assert torch.equal(policy.merge(kept, context), inner.merge(kept, context))


# ---- the two functions beneath ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_rows_are_means(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    features, keep = torch.randn(20, 3).to(dtype), torch.rand(20) < 0.3
    keep[0] = True
    kept = keep.nonzero()[:, 0].tolist()
    # Kept rows stay themselves whatever their target says.
    targets = torch.tensor([*kept, -1])[torch.randint(0, len(kept) + 1, (20,))]
    sizes = torch.randint(1, 9, (20,)).float()
    found, counts = merged(features, sizes, targets, keep)
    assert found.dtype == dtype
    for row, own in enumerate(features.float().tolist()):
        joins = [row, *(other for other, into in enumerate(targets.tolist()) if into == row and not keep[other])]
        each, total = [features[join].float().tolist() for join in joins], math.fsum(sizes[join] for join in joins)
        means = [math.fsum(v * sizes[j] for v, j in zip(c, joins, strict=True)) / total for c in zip(*each, strict=True)]
        torch.testing.assert_close(found[row], torch.tensor(means if keep[row] else own).to(dtype))
        assert counts[row] == (total if keep[row] else sizes[row])


def test_merging_adds_nothing_atomically() -> None:
    """Atomic additions of floats come in another order on every run on CUDA; of whole numbers that makes no difference."""

    def see(func: Any, args: Sequence[Any], out: Any) -> None:
        if any(name in str(func) for name in ("index_add", "scatter_add", "index_reduce", "scatter_reduce", "index_put")):
            assert not out.is_floating_point(), func

    targets, keep = torch.tensor([-1, 0, 0, -1, 3]), torch.tensor([True, False, False, True, False])
    with Watch(see):
        found, sizes = merged(torch.tensor([[1.0], [2], [6], [5], [7]]), torch.ones(5), targets, keep)
    assert found.tolist() == [[3], [2], [6], [6], [7]]
    assert sizes.tolist() == [3, 1, 1, 2, 1]


def test_farthest_points_take_what_is_left_once_all_lies_on_the_chosen() -> None:
    """Duplicates come last and from the lowest; a weight of zero comes after any other."""
    unit = unit_rows(torch.tensor([[1.0, 0], [3, 0], [0, 1], [1, 0], [-2, 0]]))
    assert farthest_points(unit, 5, 1).tolist() == [1, 4, 2, 0, 3]
    assert farthest_points(unit, 3, 1, torch.tensor([1.0, 1, 1, 1, 0])).tolist() == [1, 2, 0]
    assert farthest_points(unit, 5, 1, torch.zeros(5)).tolist() == [1, 0, 2, 3, 4]
    assert farthest_points(unit, 1, 2).tolist() == [2]
    assert nearest_distances(unit).tolist() == [0, 0, 1, 0, 1]
    assert nearest_distances(unit[:1]).tolist() == [math.inf]
    assert nearest_distances(unit_rows(torch.randn(50, 4).repeat(2, 1))).min() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 300, 1 << 24])
def test_distances_are_the_definitions(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all distances in fp64, in chunks of any size."""
    monkeypatch.setattr("trimming.selection.CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    features = torch.randn(90, 12).to(dtype)
    features[5] = features[17] = 0
    weights = torch.rand(90)
    before = features.clone()
    unit = unit_rows(features)
    assert features.equal(before)
    exact = features.double() / features.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    distances = (1 - exact @ exact.T).fill_diagonal_(0)
    alone = distances.clone().fill_diagonal_(math.inf).amin(-1)
    torch.testing.assert_close(nearest_distances(unit).double(), alone, rtol=0, atol=1e-6)
    chosen = [3]
    while len(chosen) < 40:
        worth = distances[chosen].amin(0) * weights
        worth[chosen] = -math.inf
        chosen.append(int(worth.argmax()))
    assert farthest_points(unit, 40, 3, weights).tolist() == chosen


def test_choosing_by_distance_takes_no_memory_by_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images of four tiles in one prompt are 32,000 features: all distances would be 4 GB. Here a thousand of width 8."""
    monkeypatch.setattr("trimming.selection.CHUNK_ELEMENTS", 5000)
    with Largest() as largest:
        unit = unit_rows(torch.randn(1000, 8))
        farthest_points(unit, 20, int(nearest_distances(unit).argmax()))
    assert largest.elements == 8000


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan])
def test_shares_lie_above_0_and_at_most_at_1(share: float) -> None:
    for kind in (FastV, SnapKV, ElasticCache, DivPrune, VisionZip, WeightedFarthest, ThinK):
        with pytest.raises(ValueError, match=r"^keep=.* give a number above 0 and at most 1"):
            kind(share)
    with pytest.raises(ValueError, match=r"^mass="):
        ZipVL(share)


@pytest.mark.parametrize(
    ("policy", "missing", "said"),
    [
        (FastV(0.5), "recent", "the last row's attention"),
        (SnapKV(0.5), "recent", "the last rows' attention"),
        (ZipVL(0.5), "attention", "a layer's attention"),
        (ElasticCache(0.5), "attention", "a layer's attention"),
        (WeightedFarthest(0.5), "attention", "the first cross-attention layer's attention"),
        (WeightedFarthest(0.5), "features", "features"),
        (DivPrune(0.5), "features", "features"),
        (VisionZip(0.5), "class_attention", "the class tokens' attention"),
    ],
    ids=repr,
)
def test_what_a_policy_needs_and_is_not_given_is_named(policy: Policy, missing: str, said: str) -> None:
    lacking: dict[str, Any] = {missing: None}
    with pytest.raises(ValueError, match=f"^the policy needs {said} in its context$"):
        policy.select(replace(make_context(0, False), **lacking))


def test_channels_are_cut_once_and_only_by_who_cuts() -> None:
    with pytest.raises(ValueError, match="can be cut once"):
        ThinK(0.5, ThinK(0.5))
    context = make_context(0, False)
    with pytest.raises(NotImplementedError, match="FastV merges nothing"):
        FastV(0.5).merge(FastV(0.5).select(context), context)
    with pytest.raises(NotImplementedError, match="FastV leaves out no channels"):
        FastV(0.5).channels(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
