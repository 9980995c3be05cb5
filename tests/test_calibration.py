"""What a sample proves, how it is drawn, and when a K is given up."""

from __future__ import annotations

import math
import random

import numpy as np
import pyarrow as pa
import pytest

from jobs.calibration import page
from jobs.calibration.bound import divergence, effective_size, lower_bound, size_that_would_show
from jobs.calibration.run import Calibration, Hope, Point, Target
from jobs.calibration.sample import pick
from pipeline.units import Shard

EXACT = Target(agreement=0.95, measure="exact", confidence=0.95)


def test_without_disagreement_the_bound_is_the_binomials() -> None:
    for n in (10, 59, 299, 500):
        assert lower_bound(1.0, n, 0.95) == pytest.approx(0.05 ** (1 / n), abs=1e-9)


def test_the_bound_solves_its_equation_and_orders_well() -> None:
    bound = lower_bound(0.9, 200, 0.95)
    assert 200 * divergence(0.9, bound) == pytest.approx(math.log(20), rel=1e-6)
    assert lower_bound(0.9, 100, 0.95) < bound < lower_bound(0.9, 400, 0.95) < 0.9
    assert lower_bound(0.9, 200, 0.99) < bound < lower_bound(0.95, 200, 0.95)
    assert lower_bound(0.0, 200, 0.95) == 0.0


@pytest.mark.parametrize("mean", [0.5, 0.9, 0.99])
def test_the_bound_is_wrong_no_oftener_than_it_says(mean: float) -> None:
    """Of exact matches, and of similarities in between: 4,000 samples of 200 each."""
    random = np.random.default_rng(0)
    coins = random.binomial(200, mean, 4000) / 200
    between = random.beta(4 * mean, 4 * (1 - mean), (4000, 200)).mean(1)
    for means in (coins, between):
        wrong = np.mean([lower_bound(float(m), 200, 0.95) > mean for m in means])
        assert wrong <= 0.05


@pytest.mark.parametrize(("mean", "size", "confidence"), [(1.1, 10, 0.95), (0.5, 0, 0.95), (0.5, 10, 1.0)])
def test_what_makes_no_bound(mean: float, size: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="make no bound"):
        lower_bound(mean, size, confidence)


@pytest.mark.parametrize("target", [0.9, 0.95, 0.99, 0.999])
def test_the_size_that_would_show_is_the_smallest(target: float) -> None:
    size = size_that_would_show(target, 0.95)
    assert lower_bound(1.0, size, 0.95) >= target - 1e-12
    assert lower_bound(1.0, size - 1, 0.95) < target


def test_rows_of_one_image_are_worth_one() -> None:
    assert effective_size([1] * 50) == 50
    assert effective_size([5] * 10) == 10
    assert effective_size([1, 1, 8]) == pytest.approx(100 / 66)
    assert effective_size([]) == 0


SHARDS = [Shard(f"{name}.parquet", groups, 1000, pa.schema([])) for name, groups in {"a": (3, 4), "b": (), "c": (13,)}.items()]


def test_every_row_is_as_likely() -> None:
    """Over shards of 7, 0 and 13 rows, and 4,000 seeds."""
    counts: dict[tuple[str, int], int] = {}
    for seed in range(4000):
        for unit in pick(SHARDS, 5, seed):
            counts[unit.shard, unit.start] = counts.get((unit.shard, unit.start), 0) + 1
    assert len(counts) == 20
    # A quarter of the seeds each; six standard deviations are 164.
    assert all(abs(count - 1000) < 164 for count in counts.values())


def test_a_sample_is_distinct_rows_in_order() -> None:
    units = pick(SHARDS, 9, 3)
    places = [(unit.shard, unit.start) for unit in units]
    assert places == sorted(set(places))
    assert len(places) == 9
    assert all(unit.rows == 1 and unit.name.endswith(f"{unit.start:07d}-{unit.stop:07d}") for unit in units)
    assert pick(SHARDS, 9, 3) == units != pick(SHARDS, 9, 4)
    assert len(pick(SHARDS, 500, 0)) == 20


def test_a_k_is_given_up_once_it_cannot_hold() -> None:
    """Of 300 rows, 95 % with 95 % confidence allow a few to differ, and no more."""
    allowed = max(d for d in range(30) if lower_bound(1 - d / 300, 300, 0.95) >= 0.95)
    assert 1 < allowed < 15
    full = {str(i): "yes" for i in range(300)}
    hope = Hope(EXACT, 300)
    hope.add("k", {str(i): "no" for i in range(allowed)}, full)
    assert not hope.lost("k")
    # A row that either side has not answered says nothing.
    hope.add("k", {"100": None, "1000": "no"}, {**full, "1000": None})
    assert not hope.lost("k")
    hope.add("k", {"101": "no"}, full)
    assert hope.lost("k")
    assert not hope.lost("another")


def test_giving_up_never_decides_otherwise_than_the_whole_sample() -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = 120
        wrong = draw.choice([0.0, 0.02, 0.05, 0.2])
        texts = {str(i): "no" if draw.random() < wrong else "yes" for i in range(rows)}
        hope = Hope(Target(agreement=0.9, measure="exact", confidence=0.95), rows)
        lost = False
        for id, text in texts.items():
            hope.add("k", {id: text}, {id: "yes"})
            lost = lost or hope.lost("k")
        agreed = sum(text == "yes" for text in texts.values()) / rows
        assert lost == (lower_bound(agreed, rows, 0.95) < 0.9)


def calibration(*points: Point, rows: int = 500, chosen: float | None = None) -> Calibration:
    return Calibration(EXACT, points, rows, 3, 4000.0, 10.0, 20.0, chosen)


def point(
    k_ratio: float, agreement: float, at_least: float, holds: bool, effective: float = 400, given_up: bool = False
) -> Point:
    return Point(k_ratio, 500, 450, effective, agreement, at_least, 0.6, 2000.0, 5.0, holds, given_up)


def test_the_verdict_says_what_was_proved() -> None:
    found = calibration(point(0.5, 1.0, 0.99, True), point(0.25, 0.985, 0.966, True), point(0.1, 0.9, 0.85, False), chosen=0.25)
    said = page.verdict(found)
    assert "K = 0.25 is the smallest that holds 95.00% agreement (texts that are equal) at 95% confidence" in said
    assert "98.50% measured, at least 96.60%; it keeps 60.0% of the features" in said
    text = page.markdown(found, {"Sample": "500 rows"}, "curve.svg")
    assert "| **0.25** | 60.0% | 2.0 KiB | 98.50% | 96.60% | yes | 0.50 × |" in text
    assert "**Errors**: 3 rows of 500" in text
    # 20 of the tower, 10 with all features, 5 for each of three.
    assert "1.50 times those of the sample's run with all features alone" in text
    assert "Given up" not in text


def test_a_sample_that_is_too_small_is_told_from_a_k_that_is() -> None:
    small = page.verdict(calibration(point(0.5, 1.0, 0.9, False, effective=30), rows=40))
    assert "too small" in small
    assert "its 40 rows are worth 30 independent ones, which show no more than 90.50% even if all agree" in small
    assert "rows worth 59 could show it" in small
    failed = page.verdict(calibration(point(0.5, 0.93, 0.9, False)))
    assert "No K holds" in failed
    assert "K = 0.5, agrees in 93.00%, at least 90.00%" in failed


def test_the_curve_is_the_same_each_time() -> None:
    found = calibration(point(0.5, 1.0, 0.99, True), point(0.1, 0.9, 0.85, False, given_up=True), chosen=0.5)
    svg = page.curve(found)
    assert svg == page.curve(found)
    assert b"target 95.00%" in svg
    assert b"60% kept" in svg
    assert "given up after 500" in page.markdown(found, {}, "c.svg")
