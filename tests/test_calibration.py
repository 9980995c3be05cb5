"""What a sample proves, how it is drawn, and when a K is given up."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.calibration import page
from jobs.calibration.bound import divergence, effective_size, lower_bound, size_that_would_show
from jobs.calibration.run import Calibration, Hope, Point, Spent, Target
from jobs.calibration.sample import Range, pick, pick_images, units_of
from pipeline.storage import Storage
from pipeline.units import Shard, read_footers

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
        for name, start, _ in pick(SHARDS, 5, seed):
            counts[name, start] = counts.get((name, start), 0) + 1
    assert len(counts) == 20
    # A quarter of the seeds each; six standard deviations are 164.
    assert all(abs(count - 1000) < 164 for count in counts.values())


def test_a_sample_is_distinct_rows_in_order() -> None:
    drawn = pick(SHARDS, 9, 3)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 9
    assert all(stop == start + 1 for _, start, stop in drawn)
    assert pick(SHARDS, 9, 3) == drawn != pick(SHARDS, 9, 4)
    assert len(pick(SHARDS, 500, 0)) == 20


def test_units_are_the_ranges() -> None:
    units = units_of(SHARDS, [("c.parquet", 2, 5), ("gone.parquet", 0, 1), ("a.parquet", 6, 7)])
    assert [(unit.shard, unit.start, unit.stop, unit.rows) for unit in units] == [
        ("c.parquet", 2, 5, 3),
        ("a.parquet", 6, 7, 1),
    ]
    # No end of theirs may move.
    assert {(unit.start_reach, unit.stop_reach) for unit in units} == {(0, 0)}
    assert units[0].name.endswith("-0000002-0000005")
    assert units[0].bytes == 3 * 1000 // 13


# Rows about each image, with one that has many; letters tell images apart, . is a row without one.
IN_ORDER = "aaabbcdddddd.eef..ggghhhhhhhhhhijjjj"


def write_shards(folder: Path, images: str, group: int) -> tuple[Storage, Sequence[Shard]]:
    """Two shards of these rows, the second with its images in another order."""
    folder.mkdir()
    for name, rows in (("a", images), ("b", images[::-1])):
        cells = [None if letter == "." else {"bytes": f"{name}{letter}".encode(), "path": None} for letter in rows]
        pq.write_table(pa.table({"picture": cells}), folder / f"{name}.parquet", row_group_size=group)
    root = Storage(str(folder))
    return root, read_footers(root, ["a.parquet", "b.parquet"])


def images_of(rows: str) -> list[tuple[int, int]]:
    """(start, stop) of each, as the letters show it."""
    starts = [i for i, letter in enumerate(rows) if i == 0 or letter == "." or letter != rows[i - 1]]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


@pytest.mark.parametrize("group", [1, 2, 5, 16, 100])
def test_images_come_with_all_their_rows_whatever_the_row_groups(tmp_path: Path, group: int) -> None:
    root, shards = write_shards(tmp_path / "in", IN_ORDER, group)
    total = 2 * len(IN_ORDER)
    every = [("a.parquet", *image) for image in images_of(IN_ORDER)]
    every += [("b.parquet", *image) for image in images_of(IN_ORDER[::-1])]
    assert pick_images(root, "picture", shards, total, 0) == every
    for seed in range(40):
        drawn = {(name, start) for name, start, _ in pick(shards, 20, seed)}
        assert pick_images(root, "picture", shards, 20, seed) == [image for image in every if image[:2] in drawn]


def test_every_image_is_as_likely_and_as_many_rows_come_as_were_asked(tmp_path: Path) -> None:
    root, shards = write_shards(tmp_path / "in", "aaaaaaaabcc", 4)
    counts: Counter[Range] = Counter()
    for seed in range(400):
        counts.update(pick_images(root, "picture", shards, 11, seed))
    # Half of the rows are drawn: six images, each in half of the 400; five standard deviations are 50.
    assert len(counts) == 6
    assert all(abs(count - 200) < 50 for count in counts.values())
    rows = sum(count * (stop - start) for (_, start, stop), count in counts.items())
    assert rows / 400 == pytest.approx(11, rel=0.1)


def test_damaged_rows_stand_alone(tmp_path: Path) -> None:
    """Half of a shard is overwritten: those rows that are drawn are units of their own, and the others are as they were."""
    rng = np.random.default_rng(0)
    images = [rng.bytes(40_000) for _ in range(8)]
    rows = pa.table({"picture": pa.array([images[i // 3] for i in range(24)], pa.binary())})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=12, use_dictionary=False, compression="none")
    root = Storage(str(tmp_path))
    shards = read_footers(root, ["a.parquet"])
    whole = [("a.parquet", start, start + 3) for start in range(0, 24, 3)]
    assert pick_images(root, "picture", shards, 24, 0) == whole
    file = tmp_path / "a.parquet"
    data = bytearray(file.read_bytes())
    middle = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    data[middle : middle + 1000] = bytes(1000)
    file.write_bytes(data)
    assert pick_images(root, "picture", shards, 24, 0) == whole[:4] + [("a.parquet", row, row + 1) for row in range(12, 24)]


def test_a_k_is_given_up_once_it_cannot_hold() -> None:
    """Of 300 rows, 95 % with 95 % confidence allow a few to differ, and no more."""
    allowed = max(d for d in range(30) if lower_bound(1 - d / 300, 300, 0.95) >= 0.95)
    assert 1 < allowed < 15
    full = {str(i): "yes" for i in range(300)}
    hope = Hope(EXACT, 300, 300)
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
        hope = Hope(Target(agreement=0.9, measure="exact", confidence=0.95), rows, rows)
        lost = False
        for id, text in texts.items():
            hope.add("k", {id: text}, {id: "yes"})
            lost = lost or hope.lost("k")
        agreed = sum(text == "yes" for text in texts.values()) / rows
        assert lost == (lower_bound(agreed, rows, 0.95) < 0.9)


def test_a_k_is_given_up_as_soon_as_its_images_could_not_show_the_target() -> None:
    """300 rows of 60 images: worth 60 rows, of which one that differs is one too many."""
    full = {str(i): "yes" for i in range(300)}
    assert lower_bound(1.0, 60, 0.95) > 0.95 > lower_bound(1 - 1 / 300, 60, 0.95)
    for units, lost in ((300, False), (60, True)):
        hope = Hope(EXACT, 300, units)
        hope.add("k", {"0": "no"}, full)
        assert hope.lost("k") == lost


def spent(peak: int, of_full: float, tower: float, seconds: float, own: float) -> Spent:
    return Spent(peak, 1e6 * of_full, of_full, tower, seconds, own)


def calibration(*points: Point, rows: int = 500, tower: str | None = None, chosen: float | None = None) -> Calibration:
    return Calibration(EXACT, points, rows, 3, spent(10 << 20, 1.0, 20.0, 10.0, 4000.0), tower, chosen)


def point(
    k_ratio: float,
    agreement: float,
    at_least: float,
    holds: bool,
    effective: float = 400,
    given_up: bool = False,
    peak: int = 6 << 20,
    of_full: float = 0.55,
    tower: float = 0.0,
) -> Point:
    took = spent(peak, of_full, tower, 5.0, 2000.0)
    return Point(k_ratio, 500, 450, effective, agreement, at_least, 0.6, took, holds, given_up)


def test_what_a_run_took_is_what_the_machine_counted() -> None:
    """Twice two rows, one with an error; what rows' own caches add up to is another figure."""
    stats = {
        "rows": 4,
        "errors": 1,
        "peak_cross_kv_bytes": 700,
        "cross_kv_byte_seconds": 600.0,
        "cross_kv_byte_seconds_full": 800.0,
        "cross_kv_bytes": 3000,
        "seconds_per_stage": {"tower": 7.0, "prefill": 1.5, "decode": 2.0},
    }
    assert Spent.of(stats) == Spent(700, 200.0, 0.75, 7.0, 3.5, 1000.0)
    without = {**stats, "cross_kv_byte_seconds": None, "cross_kv_byte_seconds_full": None}
    assert Spent.of(without) == Spent(700, None, None, 7.0, 3.5, 1000.0)


def test_the_verdict_says_what_was_proved() -> None:
    found = calibration(point(0.5, 1.0, 0.99, True), point(0.25, 0.985, 0.966, True), point(0.1, 0.9, 0.85, False), chosen=0.25)
    said = page.verdict(found)
    assert "K = 0.25 is the smallest that holds 95.00% agreement (texts that are equal) at 95% confidence" in said
    assert "98.50% measured, at least 96.60%; it keeps 60.0% of the features" in said
    assert "and held 0.55 × the cross KV that all would have" in said
    text = page.markdown(found, {"Sample": "500 rows"}, "curve.svg")
    assert "| all | 10.0 MiB | 1.00 × | 1.00 × | 100.0% | | | | 3.9 KiB |" in text
    assert "| **0.25** | 6.0 MiB, 0.60 × | 0.55 × | 0.50 × | 60.0% | 98.50% | 96.60% | yes | 2.0 KiB |" in text
    assert "WARNING" not in text
    assert "**Errors**: 3 rows of 500" in text
    # 20 of the tower, 10 with all features, 5 for each of three.
    assert "1.50 times those of the sample's run with all features alone" in text
    assert "Given up" not in text


def test_a_trimmed_tower_is_named_and_its_seconds_are_counted_apart() -> None:
    alone, half = point(1.0, 1.0, 0.99, True, tower=9.0), point(0.5, 0.98, 0.96, True)
    found = calibration(alone, half, tower="alike 0.5", chosen=0.5)
    said = page.verdict(found)
    assert said.startswith("Behind a tower trimmed by alike 0.5, K = 0.5 is the smallest that holds 95.00% agreement")
    text = page.markdown(found, {}, "curve.svg")
    assert "| 1, the tower alone | " in text
    assert "(20.0 s, through the trimmed tower 9.0 s, beside 10.0 s)" in text
    # 20 and 10 with all features; 9 of the other tower, and 5 for each of two.
    assert "1.63 times those of the sample's run with all features alone" in text
    whole = calibration(alone, replace(half, holds=False), tower="alike 0.5", chosen=1.0)
    assert "alike 0.5, K = 1 (all that it leaves) is the smallest" in page.verdict(whole)
    made = yaml.safe_load(page.configuration(whole, {"tower_policy": "alike"}))
    assert made == {"tower_policy": "alike", "policy": "none"}
    failed = page.verdict(calibration(point(1.0, 0.93, 0.9, False), tower="alike 0.2"))
    assert failed.startswith("Behind a tower trimmed by alike 0.2, no K holds ")
    assert "the best, K = 1 (all that it leaves), agrees in 93.00%" in failed
    assert "leave more of the tower" in failed


def test_a_k_that_held_more_than_all_features_is_said_to() -> None:
    """A row's own cache is half of all features'. A peak is no sign of it: 0.25 had more rows to run at its own."""
    more, busy = point(0.5, 1.0, 0.99, True, of_full=1.4), point(0.25, 1.0, 0.99, True, peak=18 << 20)
    text = page.markdown(calibration(more, busy, chosen=0.25), {}, "curve.svg")
    (warning,) = (line for line in text.splitlines() if "WARNING" in line)
    assert "K = 0.5 held 1.40 × what all features would have" in warning


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
