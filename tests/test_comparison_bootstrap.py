"""Intervals that hold what they promise, by simulation, and the cases at the edges."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.comparison import bootstrap
from jobs.comparison.bootstrap import Clusters, Score, difference, groups, replicates, rows_that_would_tell, score


def draw(random: np.random.Generator, images: int, asked: int, shared: float, mean: float = 0.0) -> Clusters:
    """``asked`` rows about each image, whose values have the share ``shared`` of their variance in common."""
    common = random.normal(0, np.sqrt(shared), (images, 1))
    values = mean + common + random.normal(0, np.sqrt(1 - shared), (images, asked))
    return Clusters.of(np.repeat(np.arange(images, dtype=np.uint64), asked), values.ravel())


def test_values_add_up_by_image() -> None:
    keys = np.array([7, 3, 7, 9, 3], np.uint64)
    found = Clusters.of(keys, np.array([1.0, 2.0, 3.0, np.nan, 4.0]))
    assert found.sums.tolist() == [6.0, 4.0]
    assert found.counts.tolist() == [2, 2]
    assert (found.value, found.rows) == (2.5, 4)


def test_the_interval_covers_the_truth_in_19_of_20() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = score(draw(random, images=60, asked=4, shared=0.7, mean=0.2))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.2 <= found.high
    # A standard deviation of 300 tries is 1.3 %; rows drawn singly, as below, would cover 73 %.
    assert 0.905 <= covered / 300 <= 0.985


def test_questions_about_one_image_are_not_independent() -> None:
    clusters = draw(np.random.default_rng(1), images=400, asked=9, shared=1.0)
    values = np.repeat(clusters.sums / 9, 9)
    singly = Clusters.of(np.arange(len(values), dtype=np.uint64), values)
    whole, single = np.std(replicates(clusters)), np.std(replicates(singly))
    # Nine rows that say the same are one: the interval is √9 as wide.
    assert whole / single == pytest.approx(3.0, rel=0.08)
    assert whole == pytest.approx(clusters.error, rel=0.08)


def test_a_ratio_weighs_images_by_their_rows() -> None:
    # One image with 100 rows, all right, and 10 with one row, all wrong.
    clusters = Clusters(np.array([100.0] + [0.0] * 10), np.array([100] + [1] * 10))
    found = score(clusters)
    assert found.value == pytest.approx(100 / 110)
    # Of all draws of eleven images the large one is left out in (10/11)^11 = 35 %, and the ratio is 0 then.
    assert np.mean(replicates(clusters) == 0) == pytest.approx((10 / 11) ** 11, abs=0.04)
    assert found.low == 0.0


@pytest.mark.parametrize("kind", ["few", "many"])
def test_grouped_images_have_the_distribution_of_single_ones(kind: str) -> None:
    random = np.random.default_rng(2)
    n = 6000
    counts = random.integers(1, 4, n)
    sums = random.binomial(counts, 0.3).astype(float) if kind == "few" else random.gamma(0.5, 3.0, n) * counts
    clusters = Clusters(sums, counts)
    grouped, size, sizes = groups(clusters)
    assert len(grouped) < (10 if kind == "few" else bootstrap.MOST_GROUPS)
    assert sizes.sum() == n
    assert (size * sizes).sum() == counts.sum()
    assert (grouped * sizes).sum() == pytest.approx(sums.sum())
    value = clusters.value
    assert value is not None
    variance = np.mean((sums - value * counts) ** 2)
    assert np.average((grouped - value * size) ** 2, weights=sizes) == pytest.approx(variance, rel=1e-4)
    single = []
    for _ in range(2000):
        chosen = random.integers(0, n, n)
        single.append(sums[chosen].sum() / counts[chosen].sum())
    together = replicates(clusters)
    assert np.std(together) == pytest.approx(np.std(single), rel=0.07)
    for share in (0.025, 0.5, 0.975):
        assert np.quantile(together, share) == pytest.approx(np.quantile(single, share), abs=0.25 * np.std(single))


def test_a_report_is_the_same_each_time_and_whatever_the_rows_order() -> None:
    random = np.random.default_rng(3)
    keys, values = random.integers(0, 50, 200).astype(np.uint64), random.integers(0, 2, 200).astype(float)
    order = random.permutation(200)
    assert score(Clusters.of(keys, values)) == score(Clusters.of(keys[order], values[order]))


def test_replicates_in_chunks_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = draw(np.random.default_rng(4), 30, 2, 0.5)
    whole = replicates(clusters)
    monkeypatch.setattr(bootstrap, "_CHUNK", 100)
    assert replicates(clusters) == pytest.approx(whole, abs=1e-12)


def test_edges() -> None:
    nothing = Clusters.of(np.zeros(0, np.uint64), np.zeros(0))
    assert score(nothing) == Score(None, None, None, 0, 0)
    assert difference(nothing, "quality")["verdict"] == "not distinguishable"
    # One image says nothing about how images differ, however many questions it has.
    one = Clusters.of(np.zeros(5, np.uint64), np.array([1.0, 1, 0, 1, 1]))
    assert score(one) == Score(0.8, None, None, 5, 1)
    assert difference(one, "quality") | {"value": 0} == {
        "value": 0,
        "low": None,
        "high": None,
        "rows": 5,
        "clusters": 1,
        "verdict": "not distinguishable",
        "rows_that_would_tell": None,
    }
    alike = Clusters.of(np.array([1, 1, 2, 3], np.uint64), np.full(4, 0.1))
    value = score(alike).value
    assert score(alike) == Score(value, value, value, 4, 3)
    same = difference(Clusters.of(np.arange(9, dtype=np.uint64), np.zeros(9)), "quality")
    assert (same["low"], same["high"], same["verdict"], same["rows_that_would_tell"]) == (0, 0, "not distinguishable", None)


@pytest.mark.parametrize(("mean", "quality", "amount"), [(0.5, "better", "higher"), (-0.5, "worse", "lower")])
def test_verdicts(mean: float, quality: str, amount: str) -> None:
    clusters = draw(np.random.default_rng(5), 200, 3, 0.5, mean)
    assert difference(clusters, "quality")["verdict"] == quality
    assert difference(clusters, "amount")["verdict"] == amount
    assert difference(clusters, "quality")["rows_that_would_tell"] is None
    unclear = draw(np.random.default_rng(6), 20, 3, 0.5, mean / 10)
    assert difference(unclear, "quality")["verdict"] == "not distinguishable"
    assert difference(unclear, "quality")["rows_that_would_tell"] > 60


def test_so_many_rows_tell_in_four_of_five() -> None:
    random = np.random.default_rng(7)
    # A run that differs by 0.1 where images deviate by sqrt(0.5 + 0.5 / 2): 2.8² × 0.75 / 0.1² = 589 images of two rows.
    seen = Clusters(np.array([1.0, -1.0] * 50) * 2 * np.sqrt(0.75 * 99 / 100) + 0.2, np.full(100, 2))
    rows = rows_that_would_tell(seen)
    assert rows is not None
    assert rows == pytest.approx(2 * 588.7, abs=2)
    told = 0
    for _ in range(400):
        drawn = draw(random, rows // 2, 2, 0.5, 0.1)
        assert drawn.value is not None
        told += abs(drawn.value) > 1.96 * drawn.error
    # A standard deviation of 400 tries is 2 %.
    assert told / 400 == pytest.approx(0.8, abs=0.06)


def test_millions_of_images_take_seconds() -> None:
    random = np.random.default_rng(8)
    n = 2_000_000
    found = score(Clusters(random.normal(0.01, 1, n) * 3, np.full(n, 3)))
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / np.sqrt(n), rel=0.1)
