"""From a job to hours: the stream of rows, the memory that rows share, the steady state."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from jobs.estimation.gpus import GPUS
from jobs.estimation.job import DEFAULT_TILES, Job, cut, kv_room, read_tiles
from jobs.estimation.machine import ASSUMED, Machine, roofline
from jobs.estimation.models import config_of
from jobs.estimation.predict import Prediction, predict
from jobs.estimation.schedule import Engine
from jobs.report import STAGES
from trimming.costs import Costs
from trimming.engine import KeptSets
from trimming.tower import Alike

JOB = Job(images=1_000_000, questions=1, tiles=DEFAULT_TILES, prompt=32, output=40, longest=80, batch_size=64)
H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(config_of("11b"))


@pytest.fixture(scope="module")
def machine() -> Machine:
    return roofline(H100.title, H100.rate, H100.bandwidth, ASSUMED)


def estimate(job: Job, costs: Costs, machine: Machine, keep: float = 1.0, room: float = 50e9, **given: int) -> Prediction:
    return predict(job, costs, machine, keep=keep, kv_bytes=room, gpus=given.pop("gpus", 8), **given)


# ---- rows -------------------------------------------------------------------------------------------------------------------


def test_rows_are_spread_as_stated() -> None:
    job = replace(JOB, questions=2.5, prompt=20.4)
    rows = job.rows(5000, 0.5, lambda tiles: tiles * 1601)
    images = {row.image: row.tiles for row in rows}
    assert len(images) == pytest.approx(2000, abs=2)
    shares = {tiles: count / len(images) for tiles, count in Counter(images.values()).items()}
    assert shares == pytest.approx(job.tiles, abs=0.01)
    assert sum(row.output for row in rows) / len(rows) == pytest.approx(40, rel=0.01)
    assert (min(row.output for row in rows), max(row.output for row in rows)) == (1, 79)
    assert {row.kept for row in rows} == {round(0.5 * tiles * 1601) for tiles in job.tiles}
    assert {row.capacity for row in rows} == {20 + 80}


@pytest.mark.parametrize(("output", "longest"), [(1, 2), (1.5, 2), (64, 64), (63.7, 64)])
def test_answers_keep_their_mean_under_the_longest(output: float, longest: int) -> None:
    lengths = [row.output for row in replace(JOB, output=output, longest=longest).rows(4000, 1.0, lambda tiles: 4 * tiles)]
    assert sum(lengths) / len(lengths) == pytest.approx(output, rel=0.01)
    assert min(lengths) >= 1
    assert max(lengths) <= longest


def test_tiles_are_a_mean_or_shares() -> None:
    assert read_tiles("2.25", 4) == pytest.approx({2: 0.75, 3: 0.25})
    assert read_tiles("4", 4) == {4: 1.0}
    assert read_tiles("1:0.2,4:0.8", 4) == pytest.approx({1: 0.2, 4: 0.8})
    assert cut({1: 0.2, 4: 0.8}, 2) == pytest.approx({1: 0.2, 2: 0.8})
    assert cut({1: 0.2, 4: 0.8}, 1) == pytest.approx({1: 1.0})
    for wrong in ("", "0.5", "4.1", "5:1", "1:0.5", "1:0.5,1:0.5", "1:-1,2:2", "a", "1:a", "nan"):
        with pytest.raises(ValueError, match="tiles="):
            read_tiles(wrong, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": 0}, "images=0"),
        ({"questions": 0.5}, "questions=0.5"),
        ({"output": 100.0}, "max_new_tokens=80 is under output_tokens=100"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompt": 0.0}, "prompt_tokens=0"),
    ],
)
def test_impossible_jobs_are_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(JOB, **given)


# ---- memory -----------------------------------------------------------------------------------------------------------------


def test_room_is_what_the_engine_takes_of_a_gpu() -> None:
    # 80 GB less 21 GB of weights, 1 GiB of images, 4 GB of activations, and 1 GiB and a fiftieth that nothing may count on.
    assert kv_room(80e9, 1, 21e9, 2**30, 4e9) == pytest.approx(0.98 * 80e9 - 21e9 - 4e9 - 2 * 2**30)
    assert kv_room(141e9, 4, 177e9, 2**30, 4e9) == pytest.approx(4 * (0.98 * 141e9 - 4e9 - 2**30) - 177e9 - 2**30)


def test_a_model_that_does_not_fit_is_refused_with_how_many_gpus_would_do() -> None:
    with pytest.raises(ValueError, match=r"gpus_per_actor=1: the weights' 177 GB do not fit 1 × 80 GB.*--gpus-per-actor 3$"):
        kv_room(80e9, 1, 177e9, 2**30, 4e9)


def test_memory_holds_more_rows_of_fewer_features(costs: Costs, machine: Machine) -> None:
    job = replace(JOB, tiles={4: 1.0}, batch_size=10_000)
    full, half = (estimate(job, costs, machine, keep, room=20e9) for keep in (1.0, 0.5))
    slot = 128  # 32 + 80 tokens, to a multiple of 32
    assert full.fits == int(20e9 // costs.kv_bytes(slot, 4 * 1601))
    assert half.fits == int(20e9 // costs.kv_bytes(slot, 2 * 1601))
    # The scheduler expects rows to take a twentieth more than they do.
    for one in (full, half):
        assert 0.94 * one.fits < one.largest <= one.fits
    assert estimate(replace(job, batch_size=64), costs, machine).largest == 64


# ---- time -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize(("keep", "kept_sets"), [(1.0, "image"), (0.5, "image"), (0.5, "question")])
def test_the_steady_state_is_that_of_a_long_run(
    questions: int, keep: float, kept_sets: KeptSets, costs: Costs, machine: Machine
) -> None:
    """A run of 4,000 images, played through to its end, takes, holds and reads what its size times the steady state says."""
    job = replace(JOB, images=4000, questions=questions, kept_sets=kept_sets)
    room = 3e9
    engine = Engine(costs=costs, kv_bytes=room, max_sequences=64, kept_sets=kept_sets)
    calls = list(engine.calls(job.rows(4000 * questions, keep, engine.left)))
    whole = machine.by_stage(calls)
    steady = estimate(job, costs, machine, keep, room=room)
    for stage in STAGES:
        assert 4 * steady.stages[stage].seconds == pytest.approx(whole[stage].seconds, rel=0.03), stage
    read = sum(call.held for call in calls if call.stage == "decode")
    held = sum(call.held * machine.time([call]).seconds for call in calls)
    assert 4 * steady.cross_kv_bytes_read == pytest.approx(read, rel=0.03)
    assert 4 * steady.cross_kv_byte_seconds == pytest.approx(held, rel=0.03)
    assert steady.peak_cross_kv_bytes == pytest.approx(max(call.held for call in calls), rel=0.05)


def test_what_an_image_with_six_questions_is_predicted_to_hold(costs: Costs, machine: Machine) -> None:
    """By hand: one image of one tile, half of its 1,601 tokens kept, answers of three tokens, so that two steps are decoded."""
    job = replace(JOB, images=1, questions=6, tiles={1: 1.0}, output=3, longest=3, batch_size=6)
    token = 2 * 8 * 8 * 128 * 2
    for keep, kept_sets, sets, kept in (
        (1.0, "image", 1, 1601),
        (1.0, "question", 1, 1601),
        (0.5, "image", 1, 800),
        (0.5, "question", 6, 800),
    ):
        found = estimate(replace(job, kept_sets=kept_sets), costs, machine, keep)  # type: ignore[arg-type]
        assert found.peak_cross_kv_bytes == sets * kept * token
        # For 1,000 images like it.
        assert found.cross_kv_bytes_read == 1000 * 2 * sets * kept * token
        seconds = found.stages["prefill"].seconds + found.stages["decode"].seconds
        assert found.cross_kv_byte_seconds == pytest.approx(sets * kept * token * seconds)


def test_trimming_pays_with_several_questions_only_where_they_share_a_set(costs: Costs, machine: Machine) -> None:
    job = replace(JOB, questions=5)
    full = estimate(job, costs, machine)
    image = estimate(job, costs, machine, 0.6)
    question = estimate(replace(job, kept_sets="question"), costs, machine, 0.6)
    assert image.cross_kv_byte_seconds < 0.61 * full.cross_kv_byte_seconds < full.cross_kv_byte_seconds
    assert question.cross_kv_byte_seconds > 1.5 * full.cross_kv_byte_seconds
    assert image.stages["decode"].seconds < full.stages["decode"].seconds < question.stages["decode"].seconds
    assert image.fits > full.fits > question.fits


def test_hours_days_and_dollars_follow_from_the_seconds(costs: Costs, machine: Machine) -> None:
    one = predict(JOB, costs, machine, keep=1.0, kv_bytes=50e9, gpus=8, price=2.5)
    assert one.hours == pytest.approx(1000 * one.seconds / 3600)
    assert one.days == pytest.approx(one.hours / 8 / 24)
    assert one.dollars == pytest.approx(2.5 * one.hours)
    assert one.images_per_second == pytest.approx(1000 / one.seconds)
    four = predict(JOB, costs, machine, keep=1.0, kv_bytes=50e9, gpus=8, gpus_per_actor=4)
    # One of the four works at a time.
    assert four.hours == pytest.approx(4 * one.hours)
    assert four.images_per_second == pytest.approx(one.images_per_second / 4)
    assert four.dollars is None


def test_what_bounds_each_stage_on_an_h100(costs: Costs, machine: Machine) -> None:
    short, long = (estimate(replace(JOB, prompt=prompt), costs, machine).stages for prompt in (32, 512))
    assert [short[stage].bound for stage in STAGES] == ["operations", "bytes", "bytes"]
    # Few short prompts at once are no more than a read of the weights.
    assert [long[stage].bound for stage in STAGES] == ["operations", "operations", "bytes"]


def test_trimming_spares_decoding_and_leaves_the_tower_alone(costs: Costs, machine: Machine) -> None:
    full, half = (estimate(JOB, costs, machine, keep) for keep in (1.0, 0.5))
    assert half.stages["tower"].seconds == full.stages["tower"].seconds
    assert half.stages["decode"].seconds < full.stages["decode"].seconds


def test_options_move_what_they_should(costs: Costs, machine: Machine) -> None:
    base = estimate(JOB, costs, machine)
    whole = estimate(replace(JOB, tower_tiles="all"), costs, machine)
    real = estimate(replace(JOB, tower_tiles="real"), costs, machine)
    assert real.stages["tower"].seconds < base.stages["tower"].seconds < 0.7 * whole.stages["tower"].seconds
    # Rows that leave the tower leave everything behind it.
    half = estimate(replace(JOB, tower_policy=Alike(0.5)), costs, machine)
    assert half.stages["tower"].seconds < 0.6 * base.stages["tower"].seconds
    for name in ("peak_cross_kv_bytes", "cross_kv_bytes_read"):
        assert getattr(half, name) < 0.4 * getattr(base, name)
    assert half.stages["prefill"].seconds < base.stages["prefill"].seconds
    five = estimate(replace(JOB, questions=5), costs, machine)
    assert five.stages["tower"].seconds == pytest.approx(base.stages["tower"].seconds, rel=0.05)
    assert five.stages["decode"].seconds > 3 * base.stages["decode"].seconds
    # Without a cache, those that decide together still share their image's encoding.
    anew = replace(JOB, questions=5, image_cache=False)
    assert estimate(anew, costs, machine).stages["tower"].seconds == pytest.approx(five.stages["tower"].seconds)
    each = estimate(replace(anew, kept_sets="question"), costs, machine)
    assert each.stages["tower"].seconds > 4.5 * five.stages["tower"].seconds
    assert estimate(replace(JOB, output=1, longest=1), costs, machine).stages["decode"].seconds == 0
    assert estimate(replace(JOB, images=3), costs, machine).hours > 0
