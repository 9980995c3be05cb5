"""Questions about one image decide together: by whose attention, what they share, and that nothing else changes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import (
    Prompt,
    Row,
    assert_empty,
    drain,
    inputs_of,
    lively_model,
    make_engine,
    make_prompts,
    memories,
    record_logits,
    run_alone,
)
from torch import Tensor

from trimming import (
    DivPrune,
    ElasticCache,
    FastV,
    KeepAll,
    Policy,
    Random,
    SnapKV,
    Spread,
    ThinK,
    TrimmedLlama,
    VisionZip,
    VisualContext,
    ZipVL,
)
from trimming.engine import Completion, Engine, gather, groups, request
from trimming.engine.sequence import Decision, Sequence_

FIRST = TrimmedLlama(0.2)
LOOKING = [FIRST, FastV(0.3), SnapKV(0.3), ZipVL(0.5), ElasticCache(0.3), Spread(0.3), ThinK(0.5, FIRST)]
"""Policies that look at the text."""
BLIND = [KeepAll(), Random(0.4), DivPrune(0.3), VisionZip(0.3)]
LENGTHS = [5, 9, 1, 7, 3]
TWO_TILES = Row((2,))


def questions(count: int, row: Row = TWO_TILES, seed: int = 0) -> list[Prompt]:
    """Prompts about the same images, whose texts behind them differ in words and in length."""
    first = make_prompts([row], seed)[0]
    asked = []
    for number in range(count):
        draw = torch.Generator().manual_seed(100 * seed + number)
        tokens = [*first.tokens, *torch.randint(3, 60, (number + 1,), generator=draw).tolist()]
        asked.append(Prompt(tokens, first.images, inputs_of(tokens, first.images)))
    return asked


def ask_together(engine: Engine, *several: Sequence[Prompt]) -> list[Completion]:
    """The answers of groups of prompts, in order."""
    futures = []
    for asked in several:
        start = len(futures)
        requests = [p.request(str(start + i), LENGTHS[i % len(LENGTHS)]) for i, p in enumerate(asked)]
        futures += engine.submit_together(requests)
    drain(engine)
    return [future.result() for future in futures]


def said(completions: Sequence[Completion]) -> list[tuple[list[int], list[int]]]:
    return [(one.tokens, one.trim.kept.tolist()) for one in completions]


@dataclass(frozen=True, eq=False)
class Watched(Policy):
    """A policy, and the contexts that it was asked in."""

    inner: Policy
    contexts: list[VisualContext] = field(default_factory=list)

    def __getattribute__(self, name: str) -> Any:
        if name in ("inner", "contexts", "select", "__class__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "inner"), name)

    def select(self, context: VisualContext) -> Tensor:
        self.contexts.append(context)
        return self.inner.select(context)

    score = budget = pick = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Told(Watched):
    """A policy that keeps what it is told to, in the layers' order, and goes by another in all else."""

    keeps: list[Tensor] = field(default_factory=list)
    slices_of: list[Tensor] = field(default_factory=list)

    def __getattribute__(self, name: str) -> Any:
        if name in ("keeps", "slices_of", "channels"):
            return object.__getattribute__(self, name)
        return super().__getattribute__(name)

    def select(self, context: VisualContext) -> Tensor:
        return self.keeps.pop(0)[None]

    def channels(self, query: Tensor, key: Tensor) -> Tensor:
        return self.slices_of.pop(0)


# ---- who is a group -----------------------------------------------------------------------------------------------------


def test_groups_are_requests_with_the_same_images_in_the_order_of_their_first() -> None:
    keys = [("a",), ("b",), ("a",), (), ("a", "b"), (), ("b",)]
    assert groups(keys, [5] * 7) == [[0, 2], [1, 6], [3], [4], [5]]


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        ([60] * 200, [50, 50, 50, 50]),
        ([900] * 20, [7, 7, 6]),
        ([9000, 10, 8190], [1, 1, 1]),
        ([10] * 64, [64]),
        ([10] * 65, [33, 32]),
    ],
)
def test_large_groups_are_cut_evenly_by_a_fixed_rule(tokens: list[int], sizes: list[int]) -> None:
    parts = groups([("a",)] * len(tokens), tokens)
    assert [len(part) for part in parts] == sizes
    assert [place for part in parts for place in part] == list(range(len(tokens)))
    assert all(len(part) == 1 or sum(tokens[p] for p in part) <= request.GROUP_TOKENS for part in parts)


def test_requests_about_other_images_can_t_decide_together() -> None:
    engine = make_engine()
    one, other = questions(1)[0], questions(1, seed=1)[0]
    with pytest.raises(ValueError, match="'1' is not about the images of '0'"):
        engine.submit_together([one.request("0"), other.request("1")])
    (text,) = make_prompts([Row(())])
    with pytest.raises(ValueError, match="'0' is not about the images"):
        engine.submit_together([text.request("0"), text.request("1")])
    with pytest.raises(ValueError, match=r"65 requests of .* tokens are too many"):
        engine.submit_together([one.request(str(i)) for i in range(65)])
    long = Prompt([*one.tokens, *[5] * 200], one.images, {})
    with pytest.raises(ValueError, match=r"64 requests of 13,.* tokens are too many"):
        engine.submit_together([long.request(str(i)) for i in range(64)])
    with pytest.raises(ValueError, match="kept_sets='both'"):
        make_engine(kept_sets="both")
    assert_empty(engine)


def test_generate_groups_what_has_the_same_images_and_answers_in_order() -> None:
    a, b = questions(3), questions(2, Row((1,)), seed=1)
    mixed = [a[0], b[0], a[1], b[1], a[2]]
    engine = make_engine(TrimmedLlama(0.2))
    found = engine.generate([p.request(str(i), LENGTHS[i]) for i, p in enumerate(mixed)])
    assert [len(one.tokens) for one in found] == LENGTHS
    kept = [one.trim.kept.tolist() for one in found]
    assert kept[0] == kept[2] == kept[4] != kept[1] == kept[3]


# ---- what they decide ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
@pytest.mark.parametrize("row", [Row((2,)), Row((1, 2)), Row((1, 2), after=0)], ids=["one", "apart", "adjacent"])
def test_what_a_group_looks_at_is_the_sum_of_what_its_members_look_at(policy: Policy, row: Row) -> None:
    asked = questions(3, row)
    alone, together = Watched(policy), Watched(policy)
    ask_together(make_engine(alone, kept_sets="question", max_sequences=1), asked)
    ask_together(make_engine(together), asked)
    # Each question is prefilled by itself: all of its layers, before the next one's.
    layers = len(together.contexts)
    assert len(alone.contexts) == 3 * layers == 3 * (1 if policy.where == "first_layer" else 3)
    for layer, context in enumerate(together.contexts):
        theirs = alone.contexts[layer::layers]
        assert context.sample_ids == ("0",)
        for name in ("attention", "recent"):
            if getattr(context, name) is not None:
                added = sum(getattr(each, name) for each in theirs)
                torch.testing.assert_close(getattr(context, name), added, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("policy", [*LOOKING, *BLIND], ids=repr)
@pytest.mark.parametrize("row", [Row((2,)), Row((4, 1)), Row((1, 2), after=0)], ids=["one", "apart", "adjacent"])
def test_every_member_equals_the_model_alone_with_the_groups_set(policy: Policy, row: Row, rows: Any) -> None:
    """Against transformers' model, told to keep what the group decided."""
    asked = questions(3, row)
    engine = make_engine(policy, rows=rows)
    logits = record_logits(engine)
    decisions: list[Decision | None] = []
    conclude = engine._enters

    def enters(sequence: Any) -> None:
        decisions.append(sequence.group.decision)
        conclude(sequence)

    engine._enters = enters  # type: ignore[method-assign]
    completions = ask_together(engine, asked)
    assert all(decision is decisions[0] for decision in decisions)
    for number, (prompt, completion) in enumerate(zip(asked, completions, strict=True)):
        (decision, *_) = decisions
        assert decision is not None
        told = Told(policy, keeps=list(decision.keeps), slices_of=list(decision.channels))
        alone = run_alone(lively_model(), prompt, "0", told, rows, len(completion.tokens))
        assert completion.tokens == alone.tokens
        torch.testing.assert_close(torch.stack(logits[str(number)]), alone.logits, atol=1e-4, rtol=1e-4)
        assert completion.trim.kept.tolist() == alone.trim.kept.tolist()
        assert completion.trim.cross_kv_bytes == alone.trim.cross_kv_bytes
        assert completion.trim.self_kv_bytes == alone.trim.self_kv_bytes


@pytest.mark.parametrize("policy", [*LOOKING, *BLIND], ids=repr)
def test_a_group_holds_one_set(policy: Policy) -> None:
    asked = questions(4)
    engine = make_engine(policy)
    found = ask_together(engine, asked)
    one = found[0].trim.cross_kv_bytes_allocated
    assert engine.statistics.peak_cross_kv_bytes == one
    assert {one.trim.cross_kv_bytes_allocated for one in found} == {one}


@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_keeping_everything_is_the_same_either_way(kept_sets: str) -> None:
    asked = questions(4)
    engine = make_engine(kept_sets=kept_sets)
    found = ask_together(engine, asked)
    for prompt, completion in zip(asked, found, strict=True):
        assert completion.tokens == run_alone(lively_model(), prompt, "0", KeepAll(), "meta", len(completion.tokens)).tokens
    assert engine.statistics.peak_cross_kv_bytes == found[0].trim.cross_kv_bytes_allocated


# ---- nothing but the requests tells -------------------------------------------------------------------------------------


def tight(engine: Engine) -> None:
    """Every other decode step of more than two runs out of memory."""
    step, count = engine.decode.step, [0]

    def fails() -> Tensor:
        count[0] += 1
        if len(engine.decode.running) > 2 and count[0] % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step()

    engine.decode.step = fails  # type: ignore[method-assign]


def narrow(engine: Engine) -> None:
    """A prefill, or a decision, of more than two prompts runs out of memory."""
    run = engine.prefill._run

    def fails(batch: Any) -> Tensor:
        if len(batch.sequences) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch)

    engine.prefill._run = fails  # type: ignore[method-assign]


HARDSHIPS: dict[str, tuple[dict[str, Any], Callable[[Engine], None]]] = {
    "one at a time": ({"max_sequences": 1}, lambda engine: None),
    "two at a time": ({"max_sequences": 2}, lambda engine: None),
    "four at a time": ({"max_sequences": 4}, lambda engine: None),
    "little room": ({"kv_bytes": 200_000}, lambda engine: None),
    "no images kept": ({"image_cache_bytes": 0, "max_sequences": 3}, lambda engine: None),
    "sent back in decoding": ({}, tight),
    "prefills of two": ({}, narrow),
    "limited to one": ({}, lambda engine: engine.prefill_sequences.lower(1)),
}


@pytest.mark.parametrize("hardship", HARDSHIPS)
@pytest.mark.parametrize("policy", [*LOOKING, Random(0.4), KeepAll()], ids=repr)
def test_answers_do_not_depend_on_who_fits(policy: Policy, hardship: str) -> None:
    asked = [questions(5), questions(3, Row((4,)), seed=1), questions(1, Row((1,)), seed=2), questions(4, Row((1,)), seed=3)]
    wanted = said(ask_together(make_engine(policy), *asked))
    options, harden = HARDSHIPS[hardship]
    engine = make_engine(policy, **options)
    harden(engine)
    if policy.slices and hardship == "prefills of two":
        # Which channels stay is decided by all queries at once.
        with pytest.raises(torch.OutOfMemoryError):
            ask_together(engine, *asked)
        drain(engine)
        return
    assert said(ask_together(engine, *asked)) == wanted


def test_a_group_that_finds_no_room_waits_for_it_whole() -> None:
    """Two groups of three in a memory for four rows: the second one comes once the first has left, undivided."""
    engine = make_engine(TrimmedLlama(0.2), max_sequences=4)
    started: list[list[str]] = []
    prefill = engine.prefill.__call__

    def note(sequences: Any) -> Tensor:
        started.append([s.request.id for s in sequences])
        return prefill(sequences)

    engine.prefill = note  # type: ignore[assignment, method-assign]
    ask_together(engine, questions(3), questions(3, seed=1))
    assert started == [["0", "1", "2"], ["3", "4", "5"]]


@pytest.mark.parametrize("policy", [KeepAll(), Random(0.4), DivPrune(0.3)], ids=repr)
def test_who_decides_by_images_alone_needs_not_wait_for_the_others(policy: Policy) -> None:
    """Two of three go when there is room for two, under the same draw, and share what they keep."""
    engine = make_engine(policy, max_sequences=2)
    started: list[list[str]] = []
    run = engine.prefill._run

    def note(batch: Any) -> Tensor:
        assert batch.stores
        started.append([s.request.id for s in batch.sequences])
        return run(batch)

    engine.prefill._run = note  # type: ignore[method-assign]
    found = ask_together(engine, questions(3))
    assert started[0] == ["0", "1"]
    assert len({tuple(one.trim.kept.tolist()) for one in found}) == 1
    assert engine.statistics.peak_cross_kv_bytes == found[0].trim.cross_kv_bytes_allocated


def test_a_set_that_is_held_takes_no_room_twice() -> None:
    """Of a group that decided before it could start, those that join one that runs need no segment of their own."""
    asked = questions(5, Row((4,)))
    engine = make_engine(TrimmedLlama(0.9))
    (one, *_) = ask_together(engine, asked)
    slot = engine.memory.slot_elements_for(32) * 4
    # Room for one kept set and three rows.
    tight = make_engine(TrimmedLlama(0.9), kv_bytes=one.trim.cross_kv_bytes_allocated + 3 * slot + 300)
    ask_together(tight, asked)
    assert tight.statistics.peak_sequences == 3


# ---- projected once -----------------------------------------------------------------------------------------------------


def projected(engine: Engine, layer: int) -> list[int]:
    """Fills with the rows that each call projects to keys in a layer."""
    seen: list[int] = []
    text: Any = engine.model.model.language_model
    text.layers[layer].cross_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    return seen


def test_features_that_several_questions_keep_are_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(4)
    engine = make_engine(TrimmedLlama(0.3), kept_sets="question")
    seen = projected(engine, 3)
    found = ask_together(engine, asked)
    sets = [set(one.trim.kept.tolist()) for one in found]
    assert len({frozenset(each) for each in sets}) > 1
    assert seen == [len(set.union(*sets))]
    assert sum(map(len, sets)) > seen[0]


# ---- decoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*LOOKING, KeepAll()], ids=repr)
@pytest.mark.parametrize("kept_sets", ["image", "question"])
@pytest.mark.parametrize("limits", [(0, 1 << 19), (1 << 17, 400), (1 << 17, 1 << 19)], ids=["in place", "few", "all"])
def test_segments_are_attended_to_alike_one_by_one_and_together(
    policy: Policy, kept_sets: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "LONG_ELEMENTS", limits[0])
    monkeypatch.setattr(gather, "BUFFER_ELEMENTS", limits[1])
    asked = [questions(5), questions(2, Row((4,)), seed=1), questions(1, Row((1,)), seed=2), questions(2, Row((1, 3)), seed=3)]
    engine = make_engine(policy, kept_sets=kept_sets)
    (memory,) = memories(engine)
    logits = record_logits(engine)
    found = ask_together(engine, *asked)
    prompts = [prompt for some in asked for prompt in some]
    if limits != (1 << 17, 400):
        assert engine.decode._gather is not None
        assert (len(engine.decode._gather.buffer) > 0) == (limits[0] > 0)
    if kept_sets == "question":
        for number, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
            alone = run_alone(lively_model(), prompt, str(number), policy, "meta", len(completion.tokens))
            torch.testing.assert_close(torch.stack(logits[str(number)]), alone.logits, atol=1e-4, rtol=1e-4)
    assert torch.isnan(memory.flat).any()


# ---- accounts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_what_is_held_is_counted_once(kept_sets: str) -> None:
    asked = [questions(4), questions(2, Row((1,)), seed=1)]
    engine = make_engine(kept_sets=kept_sets)
    found = ask_together(engine, *asked)
    held = engine.statistics
    assert held.peak_cross_kv_bytes == found[0].trim.cross_kv_bytes_allocated + found[-1].trim.cross_kv_bytes_allocated
    # All features are what all features would be.
    assert held.cross_kv_byte_seconds == pytest.approx(held.cross_kv_byte_seconds_full, rel=1e-9)
    busy = engine.seconds["prefill"] + engine.seconds["decode"]
    assert 0 < held.cross_kv_byte_seconds <= held.peak_cross_kv_bytes * busy
    first, second = (one.trim.cross_kv_bytes_allocated for one in (found[0], found[-1]))
    assert held.cross_kv_bytes_read == (max(LENGTHS[:4]) - 1) * first + (max(LENGTHS[:2]) - 1) * second


def test_images_arranged_otherwise_are_counted_apart() -> None:
    """Texts behind both images, and one between them: decoding sees two images, and one."""
    (beside,), (apart,) = questions(1, Row((1, 2), after=0)), questions(1, Row((1, 2)))
    assert [image.key for image in beside.images] == [image.key for image in apart.images]
    for first, second in ((beside, apart), (apart, beside)):
        engine = make_engine()
        futures = [engine.submit(first.request("0", 3)), engine.submit(second.request("1", 9))]
        drain(engine)
        assert all(future.done() for future in futures)
        counted = engine.statistics
        assert counted.cross_kv_byte_seconds == pytest.approx(counted.cross_kv_byte_seconds_full, rel=1e-9)


def test_hits_are_counted_of_who_waits() -> None:
    engine = make_engine(TrimmedLlama(0.2), image_cache_bytes=0)
    tight(engine)
    found = ask_together(engine, questions(5))
    counted = engine.statistics
    assert len(found) == 5
    assert counted.images_encoded + counted.image_hits >= 5
    # Encoded anew only for those that were sent back.
    assert counted.image_hits <= 4 + 4 * (counted.images_encoded - 1)
    engine = make_engine(TrimmedLlama(0.2))
    ask_together(engine, questions(5))
    assert (engine.statistics.images_encoded, engine.statistics.image_hits) == (1, 4)


def test_trimmed_apart_holds_more_than_all_and_together_less() -> None:
    asked = questions(5)
    held = {}
    for kept_sets in ("image", "question"):
        engine = make_engine(TrimmedLlama(0.2), kept_sets=kept_sets)
        ask_together(engine, asked)
        counted = engine.statistics
        held[kept_sets] = counted.cross_kv_byte_seconds / counted.cross_kv_byte_seconds_full
    assert held["image"] < 1 < held["question"]


def test_nothing_of_a_group_outlives_it() -> None:
    """Requests hold pixels: they must go without waiting for the garbage collector."""
    import gc

    gc.collect()
    gc.disable()
    try:
        # Other tests' engines may still have some.
        before = {id(each): each for each in gc.get_objects() if type(each) is Sequence_}
        ask_together(make_engine(FIRST), questions(3))
        assert not [each for each in gc.get_objects() if type(each) is Sequence_ and id(each) not in before]
    finally:
        gc.enable()
