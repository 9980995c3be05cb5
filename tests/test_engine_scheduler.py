"""Who runs when: slots, failures, memory that runs out, threads."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    BATCHES,
    IMAGE,
    RATIO_OF_TILES,
    TILE,
    TILES,
    Prompt,
    Row,
    assert_empty,
    complete,
    drain,
    finish,
    make_engine,
    make_prompts,
    record_logits,
)
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from trimming import Grid, KeepAll, Policy, Random, TrimmedLlama, VisualContext
from trimming.engine import Completion, Engine, Image, Request, Sampling
from trimming.engine.limits import Limit
from trimming.engine.scheduler import out_of_memory

POLICY = TrimmedLlama(0.3)
ROWS = [*BATCHES["mixed tiles"], Row((2, 1)), Row((), before=6), Row((4,), before=1), Row((1,), after=8)]
LENGTHS = [7, 12, 3, 9, 5, 10, 1, 8]
WARM = Sampling(temperature=0.9, seed=1)


def make_requests(new_tokens: Sequence[int] = LENGTHS, **options: Any) -> list[Request]:
    prompts = make_prompts(ROWS)
    return [prompt.request(str(i), n, **options) for i, (prompt, n) in enumerate(zip(prompts, new_tokens, strict=True))]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[Completion]]:
    """Greedy and sampled."""
    kinds: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"sampling": WARM}}
    return {kind: complete(make_engine(POLICY), make_requests(**options)) for kind, options in kinds.items()}


def assert_equal(futures: Sequence[Future[Completion]], wanted: Sequence[Completion], but: Sequence[int] = ()) -> None:
    """All came out as wanted, but for those which failed."""
    assert [i for i, future in enumerate(futures) if future.exception()] == list(but)
    for number, (future, other) in enumerate(zip(futures, wanted, strict=True)):
        if number in but:
            continue
        found = future.result()
        assert (found.tokens, found.finish_reason, found.output_tokens) == (
            other.tokens,
            other.finish_reason,
            other.output_tokens,
        )
        assert found.trim.kept.tolist() == other.trim.kept.tolist()


class Exhausted:
    """A call that runs out of memory whenever it is given more than ``most``, and notes what it went through with."""

    def __init__(self, inner: Callable[..., Any], size: Callable[..., int], most: int) -> None:
        self.inner, self.size, self.most = inner, size, most
        self.sizes: list[int] = []
        self.refused: list[int] = []

    def __call__(self, *args: Any) -> Any:
        size = self.size(*args)
        if size > self.most:
            self.refused.append(size)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} GiB")
        out = self.inner(*args)
        self.sizes.append(size)
        return out


# ---- slots --------------------------------------------------------------------------------------------------------------


def simulated(lengths: Sequence[int], slots: int) -> tuple[int, int, list[list[int]]]:
    """Continuous batching in the ideal: (decode steps, most at once, who ran in each step). A first token takes no step."""
    waiting = list(enumerate(lengths))
    running: dict[int, int] = {}
    most, ran = 0, []
    while waiting or running:
        while waiting and len(running) < slots:
            batch, waiting = waiting[: slots - len(running)], waiting[slots - len(running) :]
            running |= {number: length - 1 for number, length in batch}
            most = max(most, len(running))
            running = {number: left for number, left in running.items() if left}
        if running:
            ran.append(sorted(running))
            running = {number: left - 1 for number, left in running.items() if left > 1}
    return len(ran), most, ran


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [10] * 8, [1] * 8, [20, 2, 2, 2, 2, 2, 2, 2]], ids=["mixed", "even", "ones", "long"]
)
@pytest.mark.parametrize("slots", [1, 2, 3, 8], ids="{}-slots".format)
def test_who_is_done_leaves_at_once_and_the_next_one_comes(slots: int, lengths: list[int]) -> None:
    engine = make_engine(POLICY, max_sequences=slots)
    steps, most, ran = simulated(lengths, slots)
    stepped: list[list[int]] = []
    step = engine.decode.step

    def note() -> Tensor:
        running = engine.decode.running
        # Slots stay the first ones.
        assert [s.slot for s in running] == list(range(len(running)))
        assert engine.memory.slots == len(running) <= slots
        stepped.append(sorted(int(s.request.id) for s in running))
        return step()

    engine.decode.step = note  # type: ignore[method-assign]
    complete(engine, make_requests(lengths))
    statistics = engine.statistics
    assert stepped == ran
    assert (statistics.decode_steps, statistics.peak_sequences) == (steps, most)
    assert statistics.decode_tokens == sum(lengths) - len(lengths)
    assert statistics.prefill_tokens == sum(len(request.tokens) for request in make_requests())


def test_futures_are_done_as_soon_as_their_rows_are() -> None:
    engine = make_engine()
    futures = [engine.submit(request) for request in make_requests()]
    for steps in range(1, 13):
        engine.step()
        # One token from the prefill and one from each step.
        assert [future.done() for future in futures] == [length <= steps + 1 for length in LENGTHS]
    assert_empty(engine)


def test_prefills_wait_for_one_another_when_many_run() -> None:
    """A prefill of one row reads all weights too: with twenty running, rows come by twos though places are free by ones."""
    (prompt,) = make_prompts([Row(())])
    engine = make_engine(max_sequences=20)
    lengths = [5 + number for number in range(20)] + [40] * 4
    prefill = engine.prefill = Exhausted(engine.prefill, len, 99)  # type: ignore[assignment]
    complete(engine, [prompt.request(str(number), length) for number, length in enumerate(lengths)])
    assert prefill.sizes == [20, 2, 2]
    assert engine.statistics.peak_sequences == 20


def test_small_prefills_do_not_keep_anybody_out() -> None:
    """Where memory for larger ones is wanting, one at a time must do, however many run."""
    (prompt,) = make_prompts([Row(())])
    engine = make_engine(max_sequences=20)
    engine.prefill_sequences = Limit(1)
    complete(engine, [prompt.request(str(number), 8) for number in range(20)])
    assert (engine.statistics.peak_sequences, engine.statistics.decode_steps) == (20, 7)


def test_statistics_and_seconds_begin_anew() -> None:
    engine = make_engine(POLICY)
    requests = make_requests()
    complete(engine, requests)
    assert set(engine.seconds) == {"tower", "prefill", "decode"}
    assert all(seconds > 0 for seconds in engine.seconds.values())
    first = engine.statistics
    engine.reset_statistics()
    assert (engine.statistics.prefill_tokens, engine.statistics.peak_kv_bytes, dict(engine.seconds)) == (0, 0, {})
    complete(engine, requests[-1:])
    assert engine.statistics.prefill_tokens == len(requests[-1].tokens)
    assert 0 < engine.statistics.peak_kv_bytes < first.peak_kv_bytes
    assert 0 < engine.statistics.peak_cross_kv_bytes < first.peak_cross_kv_bytes


def test_generate_gives_completions_in_order(undisturbed: dict[str, list[Completion]]) -> None:
    engine = make_engine(POLICY, max_sequences=3)
    assert [c.tokens for c in engine.generate(make_requests())] == [c.tokens for c in undisturbed["greedy"]]
    assert engine.generate([]) == []
    assert_empty(engine)


# ---- memory that runs out -----------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("trimming")]


def test_tower_out_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(POLICY)
    requests = [prompt.request(str(i), 3) for i, prompt in enumerate(make_prompts([Row((2,))] * 7))]
    wanted = complete(make_engine(POLICY), requests)
    encode = engine.tower.encode = Exhausted(engine.tower.encode, len, most=2)  # type: ignore[method-assign]
    assert_equal(finish(engine, requests), wanted)
    assert encode.refused == [7, 3]
    assert encode.sizes == [1] * 7
    assert engine.tower_images.now == 1
    assert warnings_of(caplog) == ["out of memory in the vision tower: 3 images at a time for now"]
    assert engine.statistics.images_encoded == 7


@pytest.mark.parametrize("where", ["before", "midway", "choosing"])
def test_prefill_out_of_memory(
    where: str, undisturbed: dict[str, list[Completion]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(POLICY)
    prefill = engine.prefill
    if where == "before":
        call = Exhausted(prefill, len, most=2)
        monkeypatch.setattr(engine, "prefill", call)
    elif where == "midway":
        # Segments are allocated by then, and keys and values of the first layers written.
        call = Exhausted(prefill._cross_layer, lambda _, index, batch, *rest: len(batch.sequences) * (index == 1), most=2)
        monkeypatch.setattr(prefill, "_cross_layer", call)
    else:
        # Decoding chooses too, for sequences that have said something.
        call = Exhausted(engine._choose, lambda _, sequences: sum(not s.said for s in sequences), most=2)
        monkeypatch.setattr(engine, "_choose", call)
    assert_equal(finish(engine, make_requests()), undisturbed["greedy"])
    assert call.refused == [8, 4]
    assert engine.prefill_sequences.now == 2
    assert max(call.sizes) == 2
    assert warnings_of(caplog) == ["out of memory in a prefill of 8 prompts: 4 at a time for now"]


@pytest.mark.parametrize("where", ["before", "midway", "logits", "choosing"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_decode_out_of_memory(
    kind: str,
    where: str,
    undisturbed: dict[str, list[Completion]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of them are sent back to begin anew, and say what they would have said; the others take the step again, the same
    step: with sampled rows a wrong position or a token too many shows."""
    engine = make_engine(POLICY)
    decode = engine.decode
    if where == "before":
        call = Exhausted(decode.step, lambda: len(decode.running), most=3)
        monkeypatch.setattr(decode, "step", call)
    elif where == "midway":
        call = Exhausted(decode._self_layer, lambda layer, index, *rest: len(decode.running) * (index == 2), most=3)
        monkeypatch.setattr(decode, "_self_layer", call)
    elif where == "logits":
        head = engine.model.lm_head
        # Which prefills call too, before their sequences run.
        call = Exhausted(head.forward, lambda states: len(states) * (len(states) == len(decode.running)), most=3)
        monkeypatch.setattr(head, "forward", call)
    else:
        call = Exhausted(engine._choose, lambda _, sequences: sum(bool(s.said) for s in sequences), most=3)
        monkeypatch.setattr(engine, "_choose", call)
    logits = record_logits(engine)
    # The row that ends with its prefill leaves seven.
    options = {"sampling": WARM} if kind == "sampled" else {}
    assert_equal(finish(engine, make_requests(**options)), undisturbed[kind])
    assert call.refused == [7]
    assert engine.max_sequences.now == 3
    assert max(call.sizes) == 3
    assert warnings_of(caplog) == ["out of memory in decoding: 3 sequences at a time for now"]
    # Some were prefilled twice, which the record of choices shows.
    assert sum(map(len, logits.values())) > sum(LENGTHS)


def test_who_is_sent_back_comes_before_those_who_waited() -> None:
    engine = make_engine(POLICY, max_sequences=5)
    decode = engine.decode
    decode.step = Exhausted(decode.step, lambda: len(decode.running), most=3)  # type: ignore[method-assign]
    order: list[str] = []
    prefill = engine.prefill
    engine.prefill = lambda batch: (order.extend(s.request.id for s in batch), prefill(batch))[1]  # type: ignore[assignment]
    complete(engine, make_requests([9] * 8))
    assert order == [*"01234", *"234", *"567"]


def test_decode_out_of_memory_again_and_again(
    undisturbed: dict[str, list[Completion]], caplog: pytest.LogCaptureFixture
) -> None:
    """At an odd step, not the first; until one runs alone; one warning for all of it."""
    engine = make_engine(POLICY)
    decode = engine.decode
    count = iter(range(10_000))
    step = Exhausted(decode.step, lambda: len(decode.running) if next(count) % 3 == 2 else 0, most=1)
    decode.step = step  # type: ignore[method-assign]
    assert_equal(finish(engine, make_requests(sampling=WARM)), undisturbed["sampled"])
    assert engine.max_sequences.now == 1
    assert len(step.refused) > 1
    assert len(warnings_of(caplog)) == 1


def test_decode_logits_after_a_repeated_step() -> None:
    """Exactly those of a step that was taken once."""
    wanted, found = [], []
    for most in (8, 3):
        engine = make_engine(KeepAll())
        logits = record_logits(engine)
        lm_head = engine.decode._self_layer
        engine.decode._self_layer = Exhausted(  # type: ignore[method-assign]
            lm_head, lambda layer, index, *rest, decode=engine.decode: len(decode.running) * (index == 3), most
        )
        complete(engine, make_requests())
        (wanted if most == 8 else found).append(logits)
    for id, rows in wanted[0].items():
        torch.testing.assert_close(torch.stack(found[0][id][-len(rows) :]), torch.stack(rows), atol=1e-4, rtol=1e-4)


def test_all_three_run_out_with_one_warning(undisturbed: dict[str, list[Completion]], caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(POLICY, max_sequences=6)
    decode = engine.decode
    engine.tower.encode = Exhausted(engine.tower.encode, len, 1)  # type: ignore[method-assign]
    engine.prefill = Exhausted(engine.prefill, len, 3)  # type: ignore[assignment]
    decode.step = Exhausted(decode.step, lambda: len(decode.running), 4)  # type: ignore[method-assign]
    assert_equal(finish(engine, make_requests()), undisturbed["greedy"])
    assert len(warnings_of(caplog)) == 1


def test_one_row_that_never_fits_fails_alone(undisturbed: dict[str, list[Completion]]) -> None:
    engine = make_engine(POLICY)
    engine.tower.encode = Exhausted(  # type: ignore[method-assign]
        engine.tower.encode, lambda images: sum(image.key == "0/3/0" for image in images), 0
    )
    engine.prefill = Exhausted(  # type: ignore[assignment]
        engine.prefill, lambda batch: sum(s.request.id == "5" for s in batch), 0
    )
    futures = finish(engine, make_requests())
    assert_equal(futures, undisturbed["greedy"], but=[3, 5])
    assert all(isinstance(futures[i].exception(), torch.OutOfMemoryError) for i in (3, 5))


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    said = "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    assert out_of_memory(RuntimeError(said))
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("memory"))


# ---- rows that fail -----------------------------------------------------------------------------------------------------


def replaced(requests: list[Request], number: int, **fields: Any) -> list[Request]:
    old = requests[number]
    given = {
        "id": old.id,
        "tokens": old.tokens,
        "images": old.images,
        "max_new_tokens": old.max_new_tokens,
        "sampling": old.sampling,
    }
    return [*requests[:number], Request(**{**given, **fields}), *requests[number + 1 :]]


@pytest.mark.parametrize("policy", [POLICY, KeepAll(), Random(0.5), Grid(0.5)], ids=repr)
def test_a_poisoned_prompt_fails_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that can't decide about one row."""
    requests = make_requests()
    wanted = complete(make_engine(policy), requests)
    engine = make_engine(policy)
    select = type(policy).select

    def picky(self: Policy, context: VisualContext) -> Tensor:
        if "poisoned" in context.sample_ids:
            raise IndexError("no such feature")
        return select(self, context)

    monkeypatch.setattr(type(policy), "select", picky)
    futures = finish(engine, replaced(requests, 2, id="poisoned"))
    assert_equal(futures, wanted, but=[2])
    assert isinstance(futures[2].exception(), IndexError)
    assert futures[2].exception().__traceback__ is futures[2].exception().__context__ is None
    # It has spoiled nothing.
    assert engine.prefill_sequences.now == engine.prefill_sequences.most
    assert_equal(finish(engine, requests), wanted)


def broken(tiles: int) -> Image:
    return Image("broken", torch.full((tiles, 3, TILE, TILE), torch.inf), RATIO_OF_TILES[tiles])


def refuse_broken(pixels: Tensor) -> Tensor:
    if pixels.isinf().any():
        raise RuntimeError("no such colour")
    return pixels


@pytest.mark.parametrize("seat", [0, 5, 11], ids="{}-th".format)
def test_a_poisoned_image_fails_alone(seat: int) -> None:
    """One that can't be normalised. Images behind it go through the tower together again."""
    prompts = make_prompts([Row((2,))] * 24)
    requests = [prompt.request(str(i), 3) for i, prompt in enumerate(prompts)]
    wanted = complete(make_engine(POLICY), requests)
    engine = make_engine(POLICY, normalise=refuse_broken)
    encode = engine.tower.encode = Exhausted(engine.tower.encode, len, 99)  # type: ignore[method-assign]
    futures = finish(engine, replaced(requests, seat, images=[broken(2)]))
    assert_equal(futures, wanted, but=[seat])
    assert isinstance(futures[seat].exception(), RuntimeError)
    assert sum(encode.sizes) == 23
    assert max(encode.sizes[-2:]) > 1
    assert not futures[seat].exception().__traceback__


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_numbers_that_are_none_stay_a_rows_own(kind: str, undisturbed: dict[str, list[Completion]]) -> None:
    """An image of NaN: its neighbours are what they were, and so are those who get its place in memory."""
    options = {"sampling": WARM} if kind == "sampled" else {}
    requests = make_requests(**options)
    spoilt = Image("spoilt", torch.full((4, 3, TILE, TILE), torch.nan), 6)
    engine = make_engine(POLICY, max_sequences=4)
    assert_equal(
        [f for i, f in enumerate(finish(engine, replaced(requests, 1, images=[spoilt]))) if i != 1],
        [c for i, c in enumerate(undisturbed[kind]) if i != 1],
    )
    assert_equal(finish(engine, requests), undisturbed[kind])


def test_a_row_whose_future_was_cancelled_harms_nobody(undisturbed: dict[str, list[Completion]]) -> None:
    engine = make_engine(POLICY)
    futures = [engine.submit(request) for request in make_requests()]
    futures[1].cancel()
    drain(engine)
    rest = [i for i, future in enumerate(futures) if not future.cancelled()]
    assert len(rest) >= 7
    assert_equal([futures[i] for i in rest], [undisturbed["greedy"][i] for i in rest])


def test_a_failing_step_reaches_whoever_calls_it() -> None:
    engine = make_engine(POLICY)

    def fail() -> Tensor:
        raise RuntimeError("no such luck")

    engine.decode.step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no such luck"):
        engine.generate(make_requests())


# ---- refusals -----------------------------------------------------------------------------------------------------------


def picture(tiles: int, ratio_id: int = 1, side: int = TILE) -> Image:
    return Image("x", torch.zeros(tiles, 3, side, TILE), ratio_id)


WHOLE = "; give a whole number of at least 1"
LIST = "; give a list of ints, such as tokens.tolist() of one prompt"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokens": [1, IMAGE, 5]}, "1 image tokens for 0 images"),
        ({"tokens": [1, 5], "images": [picture(1)]}, "0 image tokens for 1 images"),
        ({"tokens": [1, IMAGE, IMAGE, 5], "images": [picture(1)]}, "2 image tokens for 1 images"),
        ({"tokens": []}, "no tokens; give at least one"),
        ({"tokens": torch.tensor([1, 5])}, f"tokens of type Tensor{LIST}"),
        ({"tokens": torch.tensor([[1, 5]])}, f"tokens of type Tensor{LIST}"),
        ({"tokens": np.array([1, 5])}, f"tokens of type ndarray{LIST}"),
        ({"tokens": iter([1, 5])}, f"tokens of type list_iterator{LIST}"),
        ({"tokens": "15"}, f"tokens of type str{LIST}"),
        ({"tokens": b"15"}, f"tokens of type bytes{LIST}"),
        ({"tokens": None}, f"tokens of type NoneType{LIST}"),
        ({"tokens": [[1, 5]]}, f"tokens with members of type list{LIST}"),
        ({"tokens": [1, 5.0]}, f"tokens with members of type float{LIST}"),
        ({"tokens": [True, True]}, f"tokens with members of type bool{LIST}"),
        ({"tokens": list(torch.tensor([1, 5]))}, f"tokens with members of type Tensor{LIST}"),
        ({"max_new_tokens": 0}, f"max_new_tokens=0{WHOLE}"),
        ({"max_new_tokens": -1}, f"max_new_tokens=-1{WHOLE}"),
        ({"max_new_tokens": 2.5}, f"max_new_tokens=2.5{WHOLE}"),
        ({"max_new_tokens": True}, f"max_new_tokens=True{WHOLE}"),
        ({"max_new_tokens": None}, f"max_new_tokens=None{WHOLE}"),
        ({"max_new_tokens": 254}, "may reach 257 tokens, over the model's 256"),
        ({"tokens": [5] * 253}, "may reach 257 tokens"),
        ({"stop": ["y"]}, "stop=['y'], which needs text: give the engine detokenize"),
        ({"stop": "red"}, 'stop of type str; give a list of texts, of a single one too: stop=["..."]'),
        ({"stop": None}, "stop of type NoneType; give a list of texts"),
        ({"stop": (text for text in ["red"])}, "stop of type generator; give a list of texts"),
        ({"stop": [b"red"]}, "stop with members of type bytes; give a list of texts"),
        ({"stop": [7]}, "stop with members of type int; give a list of texts"),
        ({"stop": ["red", ""]}, "an empty text in stop, which would end every answer; leave it out"),
        ({"tokens": [1, 1000]}, "a token outside of the vocabulary"),
        ({"tokens": [1, -1]}, "a token outside of the vocabulary"),
        ({"images": picture(1)}, "images of type Image; give a list of Image, of a single one too: images=[image]"),
        ({"images": [torch.zeros(1, 3, TILE, TILE)]}, "images with members of type Tensor; give a list of Image"),
    ],
)
def test_requests_that_cannot_be_run_are_refused(fields: dict[str, Any], said: str) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=f"^request 'r' (has )?{re.escape(said)}"):
        engine.submit(Request(**{"id": "r", "tokens": [1, 5, 6], "max_new_tokens": 4, **fields}))
    assert_empty(engine)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (picture(0), "0 tiles, not 1 to 4"),
        (picture(5), "5 tiles, not 1 to 4"),
        (picture(1, 0), "ratio_id=0, not 1 to 8"),
        (picture(1, 9), "ratio_id=9, not 1 to 8"),
        (picture(1, 4), "1 tiles and ratio_id=4, which arranges 4; ids of 1 tiles are 1"),
        (picture(4, 3), "4 tiles and ratio_id=3, which arranges 3; ids of 4 tiles are 4, 6, 8"),
        (picture(1, side=56), "pixels (1, 3, 56, 42); the model's are (tiles, 3, 42, 42)"),
        (Image("x", torch.zeros(3, TILE, TILE), 1), "pixels (3, 42, 42); the model's are (tiles, 3, 42, 42)"),
        (Image("x", torch.zeros(1, TILE, TILE, 3), 1), "pixels (1, 42, 42, 3); the model's are (tiles, 3, 42, 42)"),
        (Image("x", torch.zeros(()), 1), "pixels (); the model's are (tiles, 3, 42, 42)"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(image: Image, said: str) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=re.escape(f"request 'r' has an image 'x' of {said}")):
        engine.submit(Request(id="r", tokens=[1, IMAGE, 5], images=[image], max_new_tokens=4))
    assert_empty(engine)


def test_images_of_other_types_are_refused() -> None:
    pixels: Any = np.zeros((1, 3, TILE, TILE), np.uint8)
    with pytest.raises(ValueError, match="'x' has pixels of type ndarray; give a tensor"):
        Image("x", pixels, 1)
    number: Any = 1.0
    with pytest.raises(ValueError, match=r"'x' has ratio_id=1\.0, which is no int; give int\(ratio_id\)"):
        picture(1, number)


def test_every_ratio_id_has_the_tiles_of_the_processors_table() -> None:
    grids = get_all_supported_aspect_ratios(TILES)
    assert make_engine().tiles_of_ratio == [rows * columns for rows, columns in grids]


def test_integers_of_numpy_are_integers() -> None:
    """``list(array)`` holds such."""
    (plain,) = complete(make_engine(), [Request(id="r", tokens=[1, 5, 6], max_new_tokens=4)])
    tokens, length = list(np.array([1, 5, 6])), np.int64(4)
    (same,) = complete(make_engine(), [Request(id="r", tokens=tokens, max_new_tokens=length)])  # type: ignore[arg-type]
    assert same.tokens == plain.tokens


def test_a_request_may_reach_the_models_length() -> None:
    (completion,) = complete(make_engine(), [Request(id="r", tokens=[5] * 250, max_new_tokens=6)])
    assert len(completion.tokens) == 6


# ---- threads ------------------------------------------------------------------------------------------------------------


class Service:
    """An engine served on its own thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.stop, self.error = engine, threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.serve(self.stop)
        except BaseException as error:  # noqa: BLE001 - shown to the test
            self.error: BaseException | None = error

    def end(self) -> None:
        self.stop.set()
        self.engine.wake()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def serving() -> Iterator[Callable[[Engine], Service]]:
    services: list[Service] = []

    def start(engine: Engine) -> Service:
        services.append(Service(engine))
        return services[-1]

    yield start
    for service in services:
        service.end()


def test_several_threads_submit_while_it_serves(
    serving: Callable[[Engine], Service], undisturbed: dict[str, list[Completion]]
) -> None:
    engine = make_engine(POLICY, max_sequences=3)
    service = serving(engine)

    def ask(number: int) -> list[Future[Completion]]:
        futures = []
        for request in make_requests():
            futures.append(engine.submit(request))
            time.sleep(0.001 * number)
        for future in futures:
            future.result(timeout=30)
        return futures

    with ThreadPoolExecutor(4) as threads:
        for futures in list(threads.map(ask, range(4))):
            assert_equal(futures, undisturbed["greedy"])
    service.end()
    assert service.error is None
    assert_empty(engine)
    assert engine.statistics.images_encoded == sum(len(row.tiles) for row in ROWS)


def test_who_submits_during_a_step_disturbs_nothing(undisturbed: dict[str, list[Completion]]) -> None:
    """From another thread, while the engine looks through those who wait."""
    engine = make_engine(POLICY)
    requests = make_requests()
    late: list[Future[Completion]] = []
    full = engine._full

    def submit_meanwhile(sequence: Any) -> int:
        if not late:
            thread = threading.Thread(target=lambda: late.extend(engine.submit(r) for r in requests[4:]))
            thread.start()
            thread.join()
        return full(sequence)

    engine._full = submit_meanwhile  # type: ignore[method-assign]
    futures = [engine.submit(request) for request in requests[:4]]
    drain(engine)
    assert_equal(futures + late, undisturbed["greedy"])


def test_it_waits_while_there_is_nothing_to_do(serving: Callable[[Engine], Service]) -> None:
    engine = make_engine()
    steps: list[int] = []
    step = engine.step
    engine.step = lambda: (steps.append(1), step())[1]  # type: ignore[method-assign]
    service = serving(engine)
    (request,) = make_requests()[:1]
    assert engine.submit(request).result(timeout=10).output_tokens == 7
    # It may still be on its way back from the last step.
    time.sleep(0.05)
    before = len(steps)
    time.sleep(0.2)
    assert len(steps) == before
    assert service.thread.is_alive()
    assert engine.submit(request).result(timeout=10).output_tokens == 7
    service.end()


def test_it_ends_in_the_middle_of_the_work(serving: Callable[[Engine], Service]) -> None:
    engine = make_engine(max_sequences=1)
    service = serving(engine)
    futures = [engine.submit(request) for request in make_requests([60] * 8)]
    futures[0].result(timeout=30)
    service.end()
    assert not futures[-1].done()
    # Somebody else may take over.
    drain(engine)


def test_an_error_reaches_all_who_wait(serving: Callable[[Engine], Service]) -> None:
    engine = make_engine(max_sequences=2)
    step, count = engine.decode.step, iter(range(100))

    def fail_later() -> Tensor:
        if next(count) == 4:
            raise RuntimeError("device-side assert triggered")
        return step()

    engine.decode.step = fail_later  # type: ignore[method-assign]
    futures = [engine.submit(request) for request in make_requests([3, *[12] * 7])]
    service = serving(engine)
    service.thread.join(10)
    assert not service.thread.is_alive()
    assert isinstance(service.error, RuntimeError)
    assert futures[0].result(timeout=0).output_tokens == 3
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match="device-side assert triggered"):
            future.result(timeout=0)
    # Nobody would ever answer one that comes now.
    with pytest.raises(RuntimeError, match="the engine has failed: device-side assert triggered"):
        engine.submit(make_requests()[0])


def test_a_failed_request_does_not_end_the_service(serving: Callable[[Engine], Service]) -> None:
    engine = make_engine(normalise=refuse_broken)
    service = serving(engine)
    (prompt,) = make_prompts([Row((1,))])
    with pytest.raises(RuntimeError, match="no such colour"):
        engine.submit(Prompt(prompt.tokens, [broken(1)], {}).request("0")).result(timeout=10)
    with pytest.raises(ValueError, match="over the model's 256"):
        engine.submit(prompt.request("1", 256))
    assert engine.submit(prompt.request("2")).result(timeout=10).output_tokens == 10
    service.end()
    assert service.error is None


def test_a_detokenizer_that_fails_costs_its_row_alone(undisturbed: dict[str, list[Completion]]) -> None:
    def detokenize(tokens: Sequence[int]) -> str:
        if len(tokens) == LENGTHS[1]:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "half a character")
        return ""

    futures = finish(make_engine(POLICY, detokenize=detokenize), make_requests())
    assert_equal(futures, undisturbed["greedy"], but=[1])
    assert isinstance(futures[1].exception(), UnicodeDecodeError)


def test_questions_that_share_what_is_kept_run_together_at_once() -> None:
    """Room for one image's keys and values and a dozen slots: nobody waits to find out that the rest needs nothing."""
    (prompt,) = make_prompts([Row((4,))])
    requests = [prompt.request(str(i), 4) for i in range(12)]
    engine = make_engine(KeepAll())
    size = engine.memory.slot_elements_for(32) * 12 + prompt_elements(engine)
    engine = make_engine(KeepAll(), kv_bytes=(size + 64) * 4)
    complete(engine, requests)
    assert engine.statistics.peak_sequences == 12


def prompt_elements(engine: Engine) -> int:
    """Of a four-tile image's segment."""
    rows, width = [4 * engine.tower.tokens] * engine.geometry.cross_layers, engine.geometry.head_dim
    return engine.memory.segment_elements_for(rows, [width] * len(rows), [width] * len(rows))


@pytest.mark.parametrize("wrong", [{"rows": "llama"}, {"tower_tiles": "some"}], ids=["rows", "tower_tiles"])
def test_unknown_names_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"llama|some"):
        make_engine(KeepAll(), **wrong)


def test_a_batch_with_a_request_that_cannot_be_run_leaves_nothing_behind() -> None:
    engine = make_engine(POLICY)
    requests = make_requests()
    long = replace(requests[0], max_new_tokens=256)
    with pytest.raises(ValueError, match="over the model's 256"):
        engine.generate([*requests, long])
    assert not engine.waiting
