"""The engine against the model itself: every row as if it ran alone, whatever ran beside it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache

import pytest
import torch
from tiny import (
    BATCHES,
    IMAGE,
    TILES,
    TOKENS,
    Alone,
    Prompt,
    Row,
    complete,
    drain,
    lively_model,
    make_engine,
    make_prompts,
    record_logits,
    run_alone,
)
from torch import Tensor
from transformers import DynamicCache

from trimming import Grid, KeepAll, Policy, Random, Rows, TrimmedLlama, trim
from trimming.engine import Engine, prefill, scheduler
from trimming.engine.layers import attend, self_attend
from trimming.engine.sequence import Encoded, Sequence_, Span, image_spans

POLICIES = [KeepAll(), TrimmedLlama(0.2), Random(0.4), Grid(0.5)]
LONGEST = 13
TRIM_FIELDS = ("visual_tokens", "kept_visual_tokens", "cross_kv_bytes_full", "cross_kv_bytes", "self_kv_bytes")


@cache
def prompts_of(batch: str) -> list[Prompt]:
    return make_prompts(BATCHES[batch])


@cache
def references(batch: str, rows: Rows, policy: Policy) -> list[Alone]:
    return [run_alone(lively_model(), p, str(i), policy, rows, LONGEST) for i, p in enumerate(prompts_of(batch))]


def assert_same(completions: Sequence, logits: dict[str, list[Tensor]], wanted: Sequence[Alone]) -> None:
    for number, (completion, alone) in enumerate(zip(completions, wanted, strict=True)):
        length = len(completion.tokens)
        assert completion.tokens == alone.tokens[:length]
        torch.testing.assert_close(torch.stack(logits[str(number)]), alone.logits[:length], atol=1e-4, rtol=1e-4)
        assert completion.trim.kept.tolist() == alone.trim.kept.tolist()
        for field in TRIM_FIELDS:
            assert getattr(completion.trim, field) == getattr(alone.trim, field)


@pytest.mark.parametrize("slots", [1, 2, 8], ids="{}-slots".format)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_row_equals_the_row_alone(batch: str, rows: Rows, policy: Policy, slots: int) -> None:
    """Tokens, every step's logits and the record. Answers of different lengths, so that slots are given on and moved."""
    engine = make_engine(policy, rows=rows, max_sequences=slots)
    logits = record_logits(engine)
    asked = prompts_of(batch)
    lengths = [(4, LONGEST, 9, 6)[i] for i in range(len(asked))]
    completions = complete(engine, [p.request(str(i), n) for i, (p, n) in enumerate(zip(asked, lengths, strict=True))])
    assert [len(c.tokens) for c in completions] == lengths
    assert_same(completions, logits, references(batch, rows, policy))
    assert engine.statistics.peak_sequences == min(slots, len(asked))


@pytest.mark.parametrize("batch", BATCHES)
def test_keeping_everything_equals_the_untouched_model(batch: str) -> None:
    model, asked = lively_model(), prompts_of(batch)
    completions = complete(make_engine(rows="transformers"), [p.request(str(i)) for i, p in enumerate(asked)])
    for prompt, completion in zip(asked, completions, strict=True):
        plain = model.generate(**prompt.inputs, max_new_tokens=10, do_sample=False)[0, len(prompt.tokens) :]
        assert completion.tokens == plain.tolist()


@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.2)], ids=repr)
def test_requests_that_come_later_change_nothing(policy: Policy) -> None:
    """One more request every other step: prefills between decode steps, slots opened, moved and made longer."""
    engine = make_engine(policy)
    logits = record_logits(engine)
    asked = prompts_of("mixed tiles")
    lengths = [5, LONGEST, 3, 11]
    futures = []
    for number, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
        futures.append(engine.submit(prompt.request(str(number), length)))
        engine.step()
        engine.step()
    assert [future.done() for future in futures] == [True, False, True, False]
    assert [s.request.id for s in engine.decode.running] == ["1", "3"]
    drain(engine)
    assert_same([f.result() for f in futures], logits, references("mixed tiles", "meta", policy))


def test_slots_grow_and_shrink_while_sequences_run() -> None:
    """Slots are as long as the longest needs; who runs beside it, or comes once it has left, says the same."""
    first, long, last = make_prompts([Row((2,)), Row((1,), after=100), Row((3,))])
    asked = [first.request("0", 20), long.request("1", 4), last.request("2", 20)]
    wanted = [
        run_alone(lively_model(), prompt, request.id, KeepAll(), new_tokens=request.max_new_tokens)
        for prompt, request in zip((first, long, last), asked, strict=True)
    ]
    engine = make_engine()
    logits = record_logits(engine)
    futures = []
    capacities = []
    for request in asked:
        futures.append(engine.submit(request))
        for _ in range(5):
            engine.step()
            capacities.append(engine.memory.capacity)
    # Of the long one's slots nothing is given back before somebody comes who has use for it.
    assert capacities == [32] * 5 + [128] * 5 + [32] * 5
    assert [future.done() for future in futures] == [False, True, False]
    drain(engine)
    assert_same([future.result() for future in futures], logits, wanted)


@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.2)], ids=repr)
def test_a_model_that_ends_with_a_cross_attention_layer(policy: Policy) -> None:
    model, asked = lively_model(layers=6), prompts_of("text-only among images")
    engine = make_engine(policy, model)
    logits = record_logits(engine)
    completions = complete(engine, [p.request(str(i)) for i, p in enumerate(asked)])
    assert_same(completions, logits, [run_alone(model, p, str(i), policy) for i, p in enumerate(asked)])


# ---- prefill ------------------------------------------------------------------------------------------------------------


def prefilled(engine: Engine, prompts: Sequence[Prompt]) -> tuple[list[Sequence_], Tensor]:
    """One packed prefill, and its logits (B, V)."""
    sequences = []
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            sequence = Sequence_(prompt.request(str(number)), Future(), image_spans(prompt.tokens, IMAGE))
            sequence.group.encoded = [Encoded(len(i.pixels), engine.tower.encode([i]).features[0]) for i in prompt.images]
            sequences.append(sequence)
        assert engine._reserve(sequences)
        return sequences, engine.prefill(sequences)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_prompts_give_each_ones_logits_and_cache(batch: str, rows: Rows, policy: Policy) -> None:
    model, asked, engine = lively_model(), prompts_of(batch), make_engine(policy, rows=rows)
    sequences, logits = prefilled(engine, asked)
    cross = model.config.text_config.cross_attention_layers
    for number, (prompt, sequence) in enumerate(zip(asked, sequences, strict=True)):
        cache = DynamicCache(config=model.config.text_config)
        with torch.inference_mode(), trim(model, policy, rows) as trimmed:
            trimmed.sample_ids = [str(number)]
            wanted = model(**prompt.inputs, past_key_values=cache, use_cache=True).logits[0, -1]
        torch.testing.assert_close(logits[number], wanted, atol=1e-4, rtol=1e-4)
        own = [layer for i, layer in enumerate(cache.layers) if i not in cross]
        for index, layer in enumerate(own):
            key, value = (t[sequence.slot, :, : len(prompt.tokens)] for t in engine.memory.slot_layer(index))
            torch.testing.assert_close(key, layer.keys[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(value, layer.values[0], atol=1e-4, rtol=1e-4)
        if not prompt.images:
            assert sequence.segment is None
            continue
        # Decoding sees the last image, or the last adjacent ones, and no padding: the rest need not be held.
        seen = trimmed.samples[0].kept
        image, place = seen // (TILES * TOKENS), seen % (TILES * TOKENS)
        real = place < torch.tensor([len(i.pixels) for i in prompt.images])[image] * TOKENS
        stored = (image >= sequence.spans[-1].images[0]) & real
        for index, i in enumerate(cross):
            key, value = engine.memory.segment_layer(sequence.segment, index)
            torch.testing.assert_close(key, cache.layers[i].keys[0][:, stored], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(value, cache.layers[i].values[0][:, stored], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("limit", "value"), [("PREFILL_SEQUENCES", 3), ("PREFILL_TOKENS", 25)], ids=["sequences", "tokens"])
def test_prefills_are_cut(limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, limit, value)
    asked = prompts_of("mixed tiles") * 2
    engine = make_engine(TrimmedLlama(0.2))
    sizes: list[list[int]] = []
    inner = engine.prefill

    def note(batch: Sequence[Sequence_]) -> Tensor:
        sizes.append([len(s.request.tokens) for s in batch])
        return inner(batch)

    engine.prefill = note  # type: ignore[assignment]
    completions = complete(engine, [p.request(str(i % 4)) for i, p in enumerate(asked)])
    size = len if limit == "PREFILL_SEQUENCES" else sum
    assert max(map(len, sizes)) > 1
    assert max(map(size, sizes)) <= value
    # Nor smaller than they need to be: the next prompt would have been one too many.
    firsts = [batch[0] for batch in sizes[1:]]
    assert all(size([*batch, first]) > value for batch, first in zip(sizes, firsts, strict=False))
    wanted = references("mixed tiles", "meta", TrimmedLlama(0.2)) * 2
    assert [c.tokens for c in completions] == [alone.tokens[:10] for alone in wanted]
    assert engine.statistics.prefill_tokens == sum(len(p.tokens) for p in asked)


# ---- scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 100], ids="{}-rows-a-chunk".format)
def test_attending_and_scoring_in_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(7, 4, 8, generator=generator)
    key, value = torch.randn(2, 2, 11, 8, generator=generator)
    # Plainly: head h of four reads key head h // 2.
    weights = torch.stack([(query[:, h] @ key[h // 2].T * 0.3).softmax(-1) for h in range(4)])
    wanted = torch.cat([weights[h] @ value[h // 2] for h in range(4)], -1)
    # One more element than whole rows need: a chunk must not round up.
    monkeypatch.setattr(prefill, "CHUNK_ELEMENTS", rows * 4 * 11 + 1)
    attended, scores = prefill._attend_and_score(query, key, value, 0.3)
    torch.testing.assert_close(attended, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, weights.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(query, key, value, 0.3), wanted, atol=1e-5, rtol=1e-5)
    assert scores.dtype == torch.float32


def test_scores_in_bf16_are_rounded_once() -> None:
    """Of products that are rounded already, scaling rounds nothing more: a second time would move what is scored against what
    decoding attends to."""
    torch.manual_seed(0)
    query, key = (3 * torch.randn(40, 1, 24)).bfloat16(), (3 * torch.randn(1, 60, 24)).bfloat16()
    scaling = 24**-0.5
    _, scores = prefill._attend_and_score(query, key, key, scaling)
    exact = (query[:, 0].double() @ key[0].T.double() * scaling).softmax(-1).sum(0)
    twice = (query[:, 0] @ key[0].T * scaling).float().softmax(-1).sum(0)
    error, of_twice = ((found.flatten() - exact).square().mean().sqrt() for found in (scores, twice))
    assert error < 0.85 * of_twice


@pytest.mark.parametrize("causal", [True, False])
def test_prompts_attend_alike_with_and_without_grouped_heads(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(9, heads, 8) for heads in (6, 2, 2))
    query = query if causal else query[-1:]
    wanted = self_attend(query, key, value, 0.3, causal)
    monkeypatch.setattr("trimming.engine.layers._groups_are_fast", lambda key: False)
    torch.testing.assert_close(self_attend(query, key, value, 0.3, causal), wanted, atol=1e-5, rtol=1e-5)


def test_a_long_prompts_mlps_take_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = make_prompts([Row((2,), after=70)])
    wanted = complete(make_engine(), [prompt.request("0", 5)])[0]
    monkeypatch.setattr("trimming.engine.layers.MLP_ROWS", 16)
    engine = make_engine()
    rows: list[int] = []
    note = lambda module, given: rows.append(len(given[0]))  # noqa: E731
    hooks = [layer.mlp.register_forward_pre_hook(note) for layer in engine.prefill.text.layers]
    try:
        found = complete(engine, [prompt.request("0", 5)])[0]
    finally:
        for hook in hooks:
            hook.remove()
    assert max(rows) == 16
    assert found.tokens == wanted.tokens


@pytest.mark.parametrize("rows", ["meta", "transformers"])
def test_no_map_of_a_long_prompt_is_whole(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = make_prompts([Row((4,), before=3, after=70)])
    request = prompt.request("0", 5)
    wanted = complete(make_engine(TrimmedLlama(0.2), rows=rows), [request])[0]
    features = 4 * TOKENS
    limit = 4 * features * 8  # heads × features × eight rows
    monkeypatch.setattr(prefill, "CHUNK_ELEMENTS", limit)
    maps: list[int] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda t, *a, **k: (maps.append(t.numel()), softmax(t, *a, **k))[1])
    found = complete(make_engine(TrimmedLlama(0.2), rows=rows), [request])[0]
    assert max(maps) <= limit
    # All rows from the image's token on were scored, and no others.
    assert sum(maps) == 4 * features * (len(prompt.tokens) - prompt.tokens.index(IMAGE))
    assert found.tokens == wanted.tokens
    assert found.trim.kept.tolist() == wanted.trim.kept.tolist()
    alone = run_alone(lively_model(), prompt, "0", TrimmedLlama(0.2), rows, 5)
    assert found.tokens == alone.tokens
    assert found.trim.kept.tolist() == alone.trim.kept.tolist()


@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.3)], ids=repr)
def test_bf16_stays_near_fp32(policy: Policy) -> None:
    """Over one text: both are made to say what fp32 says."""
    asked = prompts_of("mixed tiles")
    exact = references("mixed tiles", "meta", policy)
    engine = make_engine(policy, lively_model(torch.bfloat16))
    logits = record_logits(engine)
    recorded = engine._choose

    def forced(rows: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
        said = [exact[int(s.request.id)].tokens[len(s.said)] for s in sequences]
        return torch.full_like(recorded(rows, sequences), 0) + torch.tensor(said)

    engine._choose = forced  # type: ignore[method-assign]
    completions = complete(engine, [p.request(str(i), LONGEST) for i, p in enumerate(asked)])
    assert [c.tokens for c in completions] == [alone.tokens for alone in exact]
    found = torch.cat([torch.stack(logits[str(i)]) for i in range(len(asked))])
    wanted = torch.cat([alone.logits for alone in exact])
    assert torch.linalg.norm(found - wanted) < 0.1 * torch.linalg.norm(wanted)
    # bf16 halves every byte count.
    assert completions[0].trim.cross_kv_bytes_full * 2 == exact[0].trim.cross_kv_bytes_full


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        ([1, 5, 6], []),
        ([IMAGE, 5, 6], [((0, 3), (0, 1))]),
        ([1, IMAGE], [((1, 2), (0, 1))]),
        ([1, IMAGE, 5, IMAGE, 6], [((1, 3), (0, 1)), ((3, 5), (1, 2))]),
        ([1, IMAGE, IMAGE, 5], [((1, 2), (0, 1)), ((2, 4), (0, 2))]),
        ([IMAGE, IMAGE, 5, IMAGE, 6], [((0, 1), (0, 1)), ((1, 3), (0, 2)), ((3, 5), (2, 3))]),
        ([IMAGE, 5, IMAGE, IMAGE, IMAGE], [((0, 2), (0, 1)), ((2, 3), (1, 2)), ((3, 4), (1, 3)), ((4, 5), (1, 4))]),
    ],
    ids=["text", "first", "last", "two", "adjacent", "adjacent-then-one", "three-adjacent"],
)
def test_which_rows_see_which_images(tokens: list[int], spans: list) -> None:
    assert image_spans(tokens, IMAGE) == [Span(rows, images) for rows, images in spans]
