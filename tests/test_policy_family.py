"""Every policy of the family, in the engine as under ``trim``: the same answers, the same features, the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from devices import Pretending, use_pretended
from test_engine_memory import guess_nothing, need_of
from test_engine_sharded import make_sharded
from tiny import BATCHES, Prompt, Row, complete, inputs_of, lively_model, make_engine, make_prompts, record_logits, run_alone
from torch import Tensor

from trimming import (
    Clusters,
    DivPrune,
    ElasticCache,
    FastV,
    KeepAll,
    Policy,
    Rows,
    SnapKV,
    Spread,
    ThinK,
    TrimmedLlama,
    VisionZip,
    VisualContext,
    WeightedFarthest,
    ZipVL,
)
from trimming.engine import Completion, Engine
from trimming.engine.memory import GRAIN, Segment

FAMILY: list[Policy] = [
    FastV(0.4),
    ZipVL(0.7),
    SnapKV(0.4),
    ElasticCache(0.4),
    DivPrune(0.4),
    VisionZip(0.4),
    WeightedFarthest(0.4),
    Spread(0.4),
    ThinK(0.5),
    ThinK(0.3, TrimmedLlama(0.2)),
    ThinK(0.5, ElasticCache(0.3)),
    ThinK(0.5, SnapKV(0.3)),
    VisionZip(0.4, weighted=True),
    ElasticCache(0.4, weighted=True),
    Clusters(0.3),
    Clusters(likeness=0.3),
    Clusters(0.4, policy=VisionZip(0.5)),
    Clusters(0.4, policy=TrimmedLlama(0.2)),
    Clusters(0.4, policy=Spread(0.5)),
    Clusters(0.4, policy=ElasticCache(0.5)),
    Clusters(0.4, policy=SnapKV(0.5)),
    ThinK(0.5, Clusters(0.3)),
    ThinK(0.5, Clusters(0.4, policy=SnapKV(0.5))),
    ThinK(0.5, ElasticCache(0.3, weighted=True)),
]
NEW_TOKENS = 8


@pytest.mark.parametrize("policy", FAMILY, ids=repr)
@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("batch", ["mixed tiles", "several images", "adjacent images", "text-only among images"])
def test_the_engine_does_what_trim_does(batch: str, rows: Rows, policy: Policy) -> None:
    prompts = make_prompts(BATCHES[batch])
    engine = make_engine(policy, rows=rows)
    logits = record_logits(engine)
    completions = complete(engine, [p.request(str(i), NEW_TOKENS) for i, p in enumerate(prompts)])
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone = run_alone(lively_model(), prompt, str(i), policy, rows, NEW_TOKENS)
        torch.testing.assert_close(torch.stack(logits[str(i)]), alone.logits, atol=1e-4, rtol=1e-4)
        assert completion.tokens == alone.tokens
        assert completion.trim.kept.tolist() == alone.trim.kept.tolist()
        into, wanted = (trim.merged_into for trim in (completion.trim, alone.trim))
        assert (into is None) == (wanted is None)
        # ``trim`` has an image for every one that some row of the batch has.
        assert into is None or wanted is None or into.tolist() == wanted[: len(into)].tolist()
        for field in ("visual_tokens", "kept_visual_tokens", "cross_kv_bytes_full", "cross_kv_bytes", "self_kv_bytes"):
            assert getattr(completion.trim, field) == getattr(alone.trim, field), field


# ---- keeping everything ---------------------------------------------------------------------------------------------------

WHOLE: list[Policy] = [
    *(kind(1.0) for kind in (FastV, ZipVL, SnapKV, ElasticCache, DivPrune, VisionZip, WeightedFarthest, Spread, ThinK)),
    ThinK(1.0, SnapKV(1.0)),
    Clusters(1.0),
    Clusters(likeness=1.0),
    Clusters(1.0, policy=SnapKV(1.0)),
    VisionZip(1.0, weighted=True),
    ElasticCache(1.0, weighted=True),
]


@pytest.mark.parametrize("policy", WHOLE, ids=repr)
@pytest.mark.parametrize("rows", ["meta", "transformers"])
def test_everything_kept_is_the_model_as_it_is(rows: Rows, policy: Policy) -> None:
    for batch in ("mixed tiles", "several images", "text-only among images"):
        prompts = make_prompts(BATCHES[batch])
        found: dict[str, Any] = {}
        wanted: dict[str, Any] = {}
        for kind, seen in ((policy, found), (KeepAll(), wanted)):
            engine = make_engine(kind, rows=rows)
            logits = record_logits(engine)
            seen["said"] = complete(engine, [p.request(str(i), NEW_TOKENS) for i, p in enumerate(prompts)])
            seen["logits"] = [torch.stack(logits[str(i)]) for i in range(len(prompts))]
        for mine, whole, one, all_of_it in zip(found["logits"], wanted["logits"], found["said"], wanted["said"], strict=True):
            torch.testing.assert_close(mine, whole, atol=1e-4, rtol=1e-4)
            assert one.tokens == all_of_it.tokens
            assert one.trim.kept.tolist() == all_of_it.trim.kept.tolist()
            biases = 0 if not policy.weighs else 3 if policy.where == "each_layer" else 1
            assert one.trim.cross_kv_bytes == all_of_it.trim.cross_kv_bytes + biases * 2 * 4 * one.trim.visual_tokens
            assert one.trim.keep_fraction in (1.0, None)
    for prompt in make_prompts([Row((3,)), Row((1, 2))]):
        mine, whole = (run_alone(lively_model(), prompt, "0", each, rows, NEW_TOKENS) for each in (policy, KeepAll()))
        torch.testing.assert_close(mine.logits, whole.logits, atol=1e-5, rtol=1e-5)
        assert mine.tokens == whole.tokens
        assert mine.trim.kept.tolist() == whole.trim.kept.tolist()


# ---- several devices, little memory, shared images ------------------------------------------------------------------------


def same(found: list[Completion], wanted: list[Completion]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        assert one.trim.kept.tolist() == other.trim.kept.tolist()
        assert one.trim.cross_kv_bytes == other.trim.cross_kv_bytes


@pytest.mark.parametrize("cuts", [(1,), (2, 4), (6,)], ids=str)
@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(0.4),
        ElasticCache(0.4, weighted=True),
        VisionZip(0.4),
        ThinK(0.5),
        ThinK(0.5, ElasticCache(0.3)),
        Clusters(0.3),
        Clusters(likeness=0.6, policy=TrimmedLlama(0.3)),
        Clusters(0.4, policy=SnapKV(0.5)),
        ThinK(0.5, Clusters(0.3)),
        VisionZip(0.4, weighted=True),
    ],
    ids=repr,
)
def test_several_devices_say_what_one_says(policy: Policy, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    use_pretended(monkeypatch)
    with Pretending():
        for batch in ("mixed tiles", "several images", "text-only among images"):
            asked = [p.request(str(i), 5 + 3 * (i % 3)) for i, p in enumerate(make_prompts(BATCHES[batch]))]
            same(complete(make_sharded(policy, cuts), asked), complete(make_engine(policy), asked))


def count_no_room(engine: Engine) -> list[int]:
    """Fills with the sizes of the batches that found no room."""
    sizes: list[int] = []
    inner = engine._no_room

    def note(batch: list[Any]) -> bool:
        sizes.append(len(batch))
        return inner(batch)

    engine._no_room = note  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize(
    "policy",
    [ZipVL(0.7), SnapKV(0.4), ThinK(0.5), ThinK(0.5, SnapKV(0.4)), ThinK(0.5, ZipVL(0.7)), Clusters(0.5)],
    ids=repr,
)
def test_little_memory_gives_the_same_tokens(policy: Policy) -> None:
    """Sequences wait, and prefills that found no room are begun anew, in smaller batches. ``complete`` sees it left empty."""
    prompts = make_prompts([Row((4,), after=n) for n in (2, 3, 4, 5, 6, 7)])
    asked = [prompt.request(str(i), 3 + 2 * i) for i, prompt in enumerate(prompts)]
    wanted = complete(make_engine(policy), asked)
    engine = make_engine(policy, kv_bytes=2 * need_of(32))
    guess_nothing(engine)
    sizes = count_no_room(engine)
    same(complete(engine, asked), wanted)
    assert sizes
    assert max(sizes) > 1
    assert engine.statistics.peak_sequences < len(asked)


@pytest.mark.parametrize("policy", [ThinK(0.5), ThinK(0.5, SnapKV(0.4))], ids=repr)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_prefill_that_breaks_off_leaves_nothing_with_its_sequences(layer: int, policy: Policy) -> None:
    """What earlier layers noted of a sequence must not stand before what its next prefill notes."""
    asked = [p.request(str(i)) for i, p in enumerate(make_prompts([Row((4,)), Row((2,), after=6)]))]
    wanted = complete(make_engine(policy), asked)
    engine = make_engine(policy)
    inner, left = engine.prefill._cross_layer, [1]

    def fail_once(*args: Any) -> None:
        inner(*args)
        if args[1] == layer and left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.prefill._cross_layer = fail_once  # type: ignore[method-assign, assignment]
    same(complete(engine, asked), wanted)
    assert not left


@pytest.mark.parametrize("policy", FAMILY, ids=repr)
def test_questions_about_one_image_share_its_encoding(policy: Policy) -> None:
    """Some come while others run; each is answered as if it were alone."""
    image = make_prompts([Row((2,))])[0].images
    asked = [[3, 64, 7, 8], [3, 4, 5, 64, 9, 10, 11], [64, 7], [9, 64, 7, 8]]
    prompts = [Prompt(tokens, image, inputs_of(tokens, image)) for tokens in asked]
    engine = make_engine(policy)
    first = engine.submit(prompts[0].request("0", NEW_TOKENS))
    engine.step()
    rest = complete(engine, [p.request(str(i), NEW_TOKENS) for i, p in enumerate(prompts) if i])
    assert engine.statistics.images_encoded == 1
    for number, completion in enumerate([first.result(), *rest]):
        alone = run_alone(lively_model(), prompts[number], str(number), policy, "meta", NEW_TOKENS)
        assert completion.tokens == alone.tokens
        assert completion.trim.kept.tolist() == alone.trim.kept.tolist()


@pytest.mark.parametrize(
    ("policy", "shared"),
    [
        (DivPrune(0.4), True),
        (VisionZip(0.4), True),
        (FastV(1.0), True),
        (ElasticCache(0.4), False),
        (ThinK(0.5), False),
        (Clusters(0.3), True),
    ],
    ids=str,
)
def test_keys_are_shared_where_the_question_does_not_decide(policy: Policy, shared: bool) -> None:
    image = make_prompts([Row((2,))])[0].images
    engine = make_engine(policy)
    segments = watch_segments(engine)
    complete(engine, [Prompt([3 + i, 64, 7, 8], image, {}).request(str(i), 4) for i in range(3)])
    assert len(set(segments.values())) == (1 if shared else 3)


# ---- bytes ----------------------------------------------------------------------------------------------------------------


def watch_segments(engine: Engine) -> dict[str, Segment]:
    """Fills with each request's segment."""
    seen: dict[str, Segment] = {}
    inner: Callable[[Any], Tensor] = engine.prefill

    def prefill(batch: Any) -> Tensor:
        logits = inner(batch)
        seen.update((sequence.request.id, sequence.segment) for sequence in batch if sequence.segment is not None)
        return logits

    engine.prefill = prefill  # type: ignore[assignment]
    return seen


@pytest.mark.parametrize("policy", FAMILY, ids=repr)
def test_bytes_are_those_of_the_segment_up_to_its_grains(policy: Policy) -> None:
    prompts = make_prompts([Row((1,)), Row((4,)), Row((2, 1), after=0), Row((), before=4)])
    engine = make_engine(policy)
    segments = watch_segments(engine)
    completions = complete(engine, [p.request(str(i), 3) for i, p in enumerate(prompts)])
    for number, completion in enumerate(completions[:3]):
        layers, trimmed = segments[str(number)].layers, completion.trim
        biases = {e.bias: 2 * e.rows * 4 for e in layers if e.bias is not None}
        assert len(biases) == (0 if not policy.weighs else len(layers) if policy.where == "each_layer" else 1)
        keys = sum(2 * e.rows * (e.key_width + e.value_width) * 4 for e in layers)
        assert trimmed.cross_kv_bytes == keys + sum(biases.values())
        grains = (2 * len(layers) + len(biases)) * GRAIN * 4
        assert 0 <= trimmed.cross_kv_bytes_allocated - trimmed.cross_kv_bytes < grains
        assert trimmed.cross_kv_bytes_allocated == segments[str(number)].size * 4
        assert trimmed.kept_visual_tokens == round(sum(e.rows for e in layers) / len(layers))
    assert completions[3].trim.cross_kv_bytes == completions[3].trim.cross_kv_bytes_allocated == 0


@pytest.mark.parametrize("inner", [KeepAll(), TrimmedLlama(0.2), SnapKV(0.3), ZipVL(0.7), VisionZip(0.4)], ids=repr)
def test_think_saves_the_channels_it_slices(inner: Policy) -> None:
    asked = [p.request(str(i), 3) for i, p in enumerate(make_prompts(BATCHES["mixed tiles"]))]
    for share, channels in ((0.5, 8), (0.3, 5), (0.01, 1)):
        whole, sliced = complete(make_engine(inner), asked), complete(make_engine(ThinK(share, inner)), asked)
        for one, other in zip(sliced, whole, strict=True):
            assert one.trim.kept_visual_tokens == other.trim.kept_visual_tokens
            assert one.trim.cross_kv_bytes * 32 == other.trim.cross_kv_bytes * (channels + 16)
            assert one.trim.cross_kv_bytes_full == other.trim.cross_kv_bytes_full


@dataclass(frozen=True)
class Counted(DivPrune):
    decided: ClassVar[list[int]] = []

    def select(self, context: VisualContext) -> torch.Tensor:
        self.decided.append(len(context.valid))
        return super().select(context)


def test_questions_about_an_image_decide_once() -> None:
    """Where only features are looked at; and another policy decides anew."""
    image = make_prompts([Row((2,))])[0].images
    asked = [Prompt([*range(3, 3 + words), 64, 7], image, {}).request(str(words), 3) for words in (2, 9, 4)]
    engine = make_engine(Counted(0.4))
    found = complete(engine, asked)
    assert Counted.decided == [1]
    assert len({tuple(completion.trim.kept.tolist()) for completion in found}) == 1
    engine.use(Counted(0.2))
    assert len(complete(engine, asked)[0].trim.kept) == len(found[0].trim.kept) // 2
    assert Counted.decided == [1, 1]
