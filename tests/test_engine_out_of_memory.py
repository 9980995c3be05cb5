"""Memory that runs out for one alone: what can be made anew is let go of, others are waited for, and only then it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from operations import Largest, Watch
from tiny import Row, complete, finish, lively_model, make_engine, make_prompts
from torch.profiler import ProfilerActivity, profile

from trimming import DivPrune, ElasticCache, KeepAll, Policy, SnapKV, TrimmedLlama
from trimming.costs import Costs, Geometry
from trimming.engine import Completion, Engine, Image, Request
from trimming.engine.limits import Limit
from trimming.engine.memory import Memory
from trimming.engine.scheduler import PREFILL_VISUAL_TOKENS, activation_bytes, out_of_memory
from trimming.engine.sequence import Encoded
from trimming.selection import farthest_points, unit_rows
from trimming.tower import Encoding
from trimming.tower.tower import _patches

POLICY = TrimmedLlama(0.2)


class Tight:
    """A call that runs out of memory as long as ``while_`` says so."""

    def __init__(self, inner: Callable[..., Any], while_: Callable[..., bool]) -> None:
        self.inner, self.while_ = inner, while_
        self.refused = self.made = 0

    def __call__(self, *args: Any) -> Any:
        if self.while_(*args):
            self.refused += 1
            # A real one, of the CPU's allocator.
            torch.empty(1 << 60, dtype=torch.uint8)
        self.made += 1
        return self.inner(*args)


def requests_of(rows: Sequence[Row], lengths: Sequence[int] = (6,)) -> list[Request]:
    return [p.request(str(i), lengths[i % len(lengths)]) for i, p in enumerate(make_prompts(rows))]


def tokens(futures: Sequence[Future[Completion]]) -> list[list[int]]:
    return [future.result(timeout=0).tokens for future in futures]


@pytest.fixture
def rows() -> list[Request]:
    return requests_of([Row((1,)), Row((4,), after=7), Row((2,)), Row((3,)), Row((2, 1))], [3, 8, 5])


def test_a_lone_image_has_the_cached_ones_dropped(rows: list[Request]) -> None:
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY)
    complete(engine, rows[:1])
    assert len(engine.images) == 1
    encode = engine.tower.encode = Tight(engine.tower.encode, lambda images: len(engine.images) > 0)  # type: ignore[method-assign]
    assert tokens(finish(engine, rows[1:2])) == wanted[1:2]
    assert (encode.refused, encode.made) == (1, 1)


def test_a_lone_image_has_others_features_dropped_which_are_encoded_again(rows: list[Request]) -> None:
    """Room for the features of two images alone."""
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY, image_cache_bytes=0)
    held = lambda images: sum(len(s.group.encoded) for s in engine.waiting) >= 2  # noqa: E731
    encode = engine.tower.encode = Tight(engine.tower.encode, held)  # type: ignore[method-assign]
    assert tokens(finish(engine, rows)) == wanted
    assert encode.refused
    assert engine.statistics.images_encoded >= 6


def test_a_lone_prompt_has_the_cached_images_dropped(rows: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY)
    prefill = Tight(engine.prefill, lambda batch: len(batch) > 1 or len(engine.images) > 0)
    monkeypatch.setattr(engine, "prefill", prefill)
    assert tokens(finish(engine, rows)) == wanted
    assert engine.prefill_sequences.now == 1


@pytest.mark.parametrize("stage", ["tower", "prefill"])
def test_one_waits_until_others_have_left(stage: str, rows: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for it beside two that run, and nothing to let go of."""
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY, image_cache_bytes=0)
    full = lambda batch: len(engine.decode.running) > 1  # noqa: E731
    engine.prefill_sequences = Limit(1)
    if stage == "tower":
        monkeypatch.setattr(engine.tower, "encode", Tight(engine.tower.encode, full))
    else:
        monkeypatch.setattr(engine, "prefill", Tight(engine.prefill, full))
    assert tokens(finish(engine, rows)) == wanted
    assert engine.statistics.peak_sequences == 2


@pytest.mark.parametrize("stage", ["tower", "prefill", "decode"])
def test_one_that_never_fits_fails_and_nobody_else(stage: str, rows: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY)
    if stage == "tower":
        monkeypatch.setattr(engine.tower, "encode", Tight(engine.tower.encode, lambda images: len(images[0].pixels) == 4))
    elif stage == "prefill":
        large = lambda batch: any(s.request.id == "1" for s in batch)  # noqa: E731
        monkeypatch.setattr(engine, "prefill", Tight(engine.prefill, large))
    else:
        runs = lambda: any(s.request.id == "1" for s in engine.decode.running)  # noqa: E731
        monkeypatch.setattr(engine.decode, "step", Tight(engine.decode.step, runs))
    futures = finish(engine, rows)
    assert [str(i) for i, future in enumerate(futures) if future.exception()] == ["1"]
    failure = futures[1].exception()
    assert failure is not None
    assert out_of_memory(failure)
    assert tokens([f for i, f in enumerate(futures) if i != 1]) == [t for i, t in enumerate(wanted) if i != 1]


def test_a_step_of_one_is_taken_again_once_memory_is_free(rows: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY, max_sequences=1)
    step = Tight(engine.decode.step, lambda: len(engine.images) > 0)
    monkeypatch.setattr(engine.decode, "step", step)
    assert tokens(finish(engine, rows)) == wanted
    assert step.refused


# ---- limits -----------------------------------------------------------------------------------------------------------------


def test_a_lowered_limit_is_raised_again() -> None:
    limit = Limit(16, patience=3)
    limit.lower(4)
    for _ in range(5):
        limit.passed(2)
    # Less than the limit proves nothing.
    assert limit.now == 4
    for _ in range(3):
        limit.passed(4)
    assert limit.now == 8
    limit.lower(4)
    for _ in range(5):
        limit.passed(4)
    # It was too much once: twice as many have to succeed now.
    assert limit.now == 4
    limit.passed(4)
    assert limit.now == 8
    for _ in range(6):
        limit.passed(8)
    assert limit.now == 16
    limit.lower(0)
    assert limit.now == 1


def test_the_engines_limits_recover(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(POLICY, max_sequences=4)
    engine.tower_images, engine.prefill_sequences = Limit(8, 2), Limit(4, 2)
    engine.max_sequences = Limit(4, 3)
    scarce = [True]
    monkeypatch.setattr(engine.tower, "encode", Tight(engine.tower.encode, lambda images: scarce[0] and len(images) > 1))
    monkeypatch.setattr(engine, "prefill", Tight(engine.prefill, lambda batch: scarce[0] and len(batch) > 1))
    step = Tight(engine.decode.step, lambda: scarce[0] and len(engine.decode.running) > 1)
    monkeypatch.setattr(engine.decode, "step", step)
    rows = requests_of([Row((2,))] * 12, [5])
    wanted = tokens(finish(make_engine(POLICY), rows))
    assert tokens(finish(engine, rows[:6])) == wanted[:6]
    # Some have been raised once in between, and lowered again.
    assert max(engine.tower_images.now, engine.prefill_sequences.now, engine.max_sequences.now) <= 2
    scarce[0] = False
    for _ in range(4):
        engine.images.clear()
        assert tokens(finish(engine, rows)) == wanted
    assert (engine.prefill_sequences.now, engine.max_sequences.now) == (4, 4)
    assert engine.tower_images.now >= 4
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_visual_tokens_count_in_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of four tiles go by twos where two tiles' go by fours; an image that several ask about counts once."""
    monkeypatch.setattr("trimming.engine.scheduler.PREFILL_VISUAL_TOKENS", 80)

    def sizes(rows: list[Request]) -> list[int]:
        engine = make_engine()
        found: list[int] = []
        prefill = engine.prefill
        monkeypatch.setattr(engine, "prefill", lambda batch: (found.append(len(batch)), prefill(batch))[1])
        complete(engine, rows)
        return found

    assert sizes(requests_of([Row((4,))] * 5)) == [2, 2, 1]
    assert sizes(requests_of([Row((2,))] * 5)) == [4, 1]
    (prompt,) = make_prompts([Row((4,))])
    assert sizes([prompt.request(str(i), 3) for i in range(5)]) == [5]
    # One that is over the limit by itself goes alone.
    assert sizes(requests_of([Row((4, 4, 4)), Row((1,))])) == [1, 1]
    assert PREFILL_VISUAL_TOKENS // 6404 == 10


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, is_one: bool) -> None:
    assert out_of_memory(error) == is_one


# ---- what the stages take ---------------------------------------------------------------------------------------------------


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had handed out at once in ``run``, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.25), SnapKV(0.5), DivPrune(0.5), ElasticCache(0.5)], ids=repr)
def test_stages_take_no_more_than_is_set_aside(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory beside weights, keys and values; nor is several times as much set aside as they take."""
    from benchmarks.model import BENCH, build_model, build_processor

    model = build_model(BENCH, build_processor(BENCH), seed=0)
    visual = 4 * 4 * Costs(model.config).tokens
    monkeypatch.setattr("trimming.engine.scheduler.TOWER_IMAGES", 4)
    monkeypatch.setattr("trimming.engine.scheduler.PREFILL_VISUAL_TOKENS", visual)
    monkeypatch.setattr("trimming.engine.scheduler.PREFILL_TOKENS", 4 * 32)
    side = BENCH.tile
    token = model.config.image_token_index
    images = [Image(str(i), torch.randn(4, 3, side, side), 4) for i in range(4)]
    requests = [
        Request(id=str(i), tokens=[token] + [7] * 31, images=[image], max_new_tokens=2) for i, image in enumerate(images)
    ]
    engine = Engine(
        model, policy, normalise=lambda pixels: pixels, eos=(), kv_bytes=1 << 27, max_sequences=4, image_cache_bytes=0
    )
    engine.generate(requests)
    taken = peak_of(lambda: engine.generate(requests))
    aside = activation_bytes(model, policy, 4)
    assert taken < aside < 4 * taken


def test_what_is_set_aside_for_the_11b() -> None:
    """Within what docs/gpu.md says of it."""
    from benchmarks.gpu.model import ELEVEN_B
    from benchmarks.model import build_config, build_processor

    costs = Costs(build_config(ELEVEN_B, build_processor(ELEVEN_B)), 2)
    sizes = {"images": 8, "visual": PREFILL_VISUAL_TOKENS, "prompt": 8192, "sequences": 256}
    assert 3.5e9 < costs.activations(**sizes) < 5e9
    assert 1e9 < costs.activations(**sizes, each_layer=True) - costs.activations(**sizes) < 3e9


# ---- what allocates beside the stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(32, 96), (96, 32), (64, 65)])
@pytest.mark.parametrize("moved", [1, 300, 1 << 25], ids="{} at once".format)
def test_slots_are_resized_in_pieces(old: int, new: int, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overlaps is moved in the right order, and no more than a piece is held."""
    monkeypatch.setattr("trimming.engine.memory.MOVED_ELEMENTS", moved)
    geometry = Geometry(self_layers=3, cross_layers=1, heads=4, kv_heads=2, head_dim=4)
    memory = Memory(geometry, 1 << 20, torch.float32, torch.device("cpu"))
    assert memory.resize(old)
    assert memory.open_slots(3)
    content = torch.randn(3, memory.slot_elements)
    memory.flat[: 3 * memory.slot_elements] = content.flatten()
    with Largest() as largest:
        assert memory.resize(new)
    common = min(old, new)
    wanted = torch.zeros(3, 3, 2, 2, new, 4)
    wanted[..., :common, :] = content.view(3, 3, 2, 2, old, 4)[..., :common, :]
    assert memory.flat[: 3 * memory.slot_elements].view_as(wanted).equal(wanted)
    assert largest.elements <= max(moved, 2 * common * 4)


def test_out_of_memory_while_slots_are_resized_is_handled_as_a_prefills(
    rows: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY)
    resize = Tight(engine.decode.resize, lambda capacity: resize.refused < 1 and capacity > 0)
    monkeypatch.setattr(engine.decode, "resize", resize)
    assert tokens(finish(engine, rows)) == wanted
    assert resize.refused == 1


def test_out_of_memory_behind_the_tower_is_handled_as_the_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image of a batch is copied out of it; none is lost where that fails."""
    rows = requests_of([Row((2,))] * 4)
    wanted = tokens(finish(make_engine(POLICY), rows))
    engine = make_engine(POLICY)
    made = Tight(Encoded, lambda *given: made.made == 1 and made.refused < 1)
    monkeypatch.setattr("trimming.engine.images.Encoded", made)
    assert tokens(finish(engine, rows)) == wanted
    assert made.refused == 1


def test_what_waits_encoded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several images each: every image of one takes neighbours' along."""
    monkeypatch.setattr("trimming.engine.scheduler.PREFILL_VISUAL_TOKENS", 200)
    engine = make_engine(POLICY, image_cache_bytes=0)
    engine.prefill_sequences = Limit(2)
    most = [0]
    encode = engine.tower.encode

    def watch(images: Sequence[Image]) -> Encoding:
        held = sum(encoded.tiles for s in engine.waiting for encoded in s.group.encoded) * 10
        most[0] = max(most[0], held + 10 * sum(len(image.pixels) for image in images))
        return encode(images)

    monkeypatch.setattr(engine.tower, "encode", watch)
    complete(engine, requests_of([Row((4, 4, 4, 4))] * 12, [2]))
    # The limit, the batch that passes it, and what the first prompts need all the same.
    assert most[0] <= 200 + 8 * 40 + 4 * 40


def test_choosing_by_distance_waits_for_nothing() -> None:
    """An assignment of a Python number by index would send it to the device and wait, once for each point."""

    def see(func: Any, args: Sequence[Any], out: Any) -> None:
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert "index_put" not in str(func) or args[2].dim(), f"{func} is given a number"

    unit = unit_rows(torch.randn(30, 4))
    with Watch(see):
        chosen = farthest_points(unit, 7, 0)
    assert len(set(chosen.tolist())) == 7


@torch.inference_mode()
def test_patches_are_the_convolutions() -> None:
    vision: Any = lively_model().model.vision_model
    pixels = torch.randn(5, 3, 42, 42)
    wanted = vision.patch_embedding(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(_patches(vision.patch_embedding, pixels), wanted, rtol=1e-5, atol=1e-5)
