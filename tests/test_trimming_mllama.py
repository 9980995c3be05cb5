"""trim(...) against the untouched model and against a model that masks what trim removes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import BATCHES, TILES, TOKENS, Row, make_inputs, tiny_model
from torch import Tensor
from transformers import DynamicCache, MllamaForConditionalGeneration, StaticCache

from trimming import Grid, KeepAll, Policy, Random, TrimmedLlama, trim

NEW_TOKENS = 16
POLICIES = [KeepAll(), TrimmedLlama(0.1), TrimmedLlama(0.3), Random(0.3), Grid(0.3)]


def decode(model: MllamaForConditionalGeneration, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, 16) and their logits (16, B, V)."""
    out = model.generate(
        **inputs,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


@contextmanager
def masked_reference(model: MllamaForConditionalGeneration, keep: Tensor, policy: Policy, rows: str) -> Iterator[None]:
    """The model with dropped features *masked*, written plainly: full keys everywhere, every step. keep: (B, N) bool."""
    layers = [layer for layer in model.model.language_model.layers if hasattr(layer, "cross_attn")]
    seeing: dict[str, Tensor] = {}

    def forward_of(module: torch.nn.Module, first: bool):
        def forward(hidden_states, cross_attention_states=None, past_key_values=None, attention_mask=None, **_):
            batch, length, _ = hidden_states.shape
            query = module.q_norm(module.q_proj(hidden_states).view(batch, length, module.num_heads, -1).transpose(1, 2))
            prefill = cross_attention_states is not None
            if prefill:
                shape = (batch, -1, module.num_key_value_heads, module.head_dim)
                key = module.k_norm(module.k_proj(cross_attention_states).view(shape).transpose(1, 2))
                value = module.v_proj(cross_attention_states).view(shape).transpose(1, 2)
                if past_key_values is not None:
                    past_key_values.update(key, value, module.layer_idx)
            else:
                key, value = past_key_values.layers[module.layer_idx].keys, past_key_values.layers[module.layer_idx].values
            key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
            scores = query @ key.transpose(-1, -2) * module.scaling + attention_mask
            if not (prefill and first and policy.where == "first_layer"):
                scores = scores.masked_fill(~keep[:, None, None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            output = module.o_proj((weights @ value).transpose(1, 2).reshape(batch, length, -1))
            return (output * seeing["rows"][:, 0] if rows == "meta" else output), weights

        return forward

    def note_rows(module, args, kwargs):
        seeing["rows"] = kwargs["full_text_row_masked_out_mask"]

    handles = [layer.register_forward_pre_hook(note_rows, with_kwargs=True) for layer in layers]
    for number, layer in enumerate(layers):
        layer.cross_attn.forward = forward_of(layer.cross_attn, first=number == 0)
    try:
        yield
    finally:
        for layer, handle in zip(layers, handles, strict=True):
            del layer.cross_attn.forward
            handle.remove()


def keep_of(samples, positions: int) -> Tensor:
    keep = torch.zeros(len(samples), positions, dtype=torch.bool)
    for row, sample in enumerate(samples):
        keep[row, sample.kept] = True
    return keep


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keeping_everything_equals_the_untouched_model_bit_for_bit(batch, padding, attention, dtype):
    model, inputs = tiny_model(dtype=dtype, attention=attention), make_inputs(BATCHES[batch], padding=padding)
    tokens, logits = decode(model, inputs)
    plain = model(**inputs).logits
    for policy in (TrimmedLlama(k_ratio=1.0), KeepAll()):
        with trim(model, policy, rows="transformers") as trimmed:
            trimmed_tokens, trimmed_logits = decode(model, inputs)
            assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(trimmed_tokens, tokens)
        assert torch.equal(trimmed_logits, logits)
        # The gather did run, over padding tiles too.
        positions = torch.arange(inputs["pixel_values"].shape[1] * TILES * TOKENS)
        assert all(torch.equal(sample.kept, positions) for sample in trimmed.samples)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_trimming_equals_masking(batch, padding, rows, attention, policy):
    inputs = make_inputs(BATCHES[batch], padding=padding)
    model = tiny_model(attention=attention)
    with trim(model, policy, rows=rows) as trimmed:
        tokens, logits = decode(model, inputs)
        samples = trimmed.samples
        prefill = model(**inputs).logits
    keep = keep_of(samples, inputs["pixel_values"].shape[1] * TILES * TOKENS)
    reference = tiny_model(attention="eager")
    with masked_reference(reference, keep, policy, rows):
        wanted_tokens, wanted_logits = decode(reference, inputs)
        wanted_prefill = reference(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(prefill[real], wanted_prefill[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, wanted_tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trimmed_bf16_stays_near_fp32(attention):
    inputs = make_inputs(BATCHES["mixed tiles"])
    exact, rough = tiny_model(attention=attention), tiny_model(dtype=torch.bfloat16, attention=attention)
    with trim(exact, Grid(0.4)):
        wanted = exact(**inputs).logits
    with trim(rough, Grid(0.4)) as trimmed:
        found = rough(**inputs).logits.float()
    real = inputs["attention_mask"].bool()
    assert torch.linalg.norm(found[real] - wanted[real]) < 0.1 * torch.linalg.norm(wanted[real])
    # bf16 halves every byte count.
    assert trimmed.samples[0].cross_kv_bytes_full == TOKENS * 3 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_kept_set_is_the_union_over_heads(batch, padding):
    """Recomputed by plain loops over samples, rows, heads and features from the eager model's own attention maps."""
    k_ratio = 0.2
    rows, inputs = BATCHES[batch], make_inputs(BATCHES[batch], padding=padding)
    model = tiny_model(attention="eager")
    maps: list[Tensor] = []
    first = model.model.language_model.layers[1].cross_attn
    handle = first.register_forward_hook(lambda module, args, output: maps.append(output[1].detach()))
    model(**inputs)
    handle.remove()
    trimming = tiny_model(attention="sdpa")
    with trim(trimming, TrimmedLlama(k_ratio)) as trimmed:
        trimming(**inputs)
    for b, row in enumerate(rows):
        sees = inputs["cross_attention_mask"][b] * inputs["attention_mask"][b][:, None, None]
        valid = [
            (image * TILES + tile) * TOKENS + token
            for image, count in enumerate(row.tiles)
            for tile in range(count)
            for token in range(TOKENS)
        ]
        counting = [q for q in range(sees.shape[0]) if sees[q].any()]
        kept: set[int] = set()
        totals = dict.fromkeys(valid, 0.0)
        for head in range(4):
            score = {n: sum(float(maps[0][b, head, q, n]) for q in counting) for n in valid}
            for n in valid:
                totals[n] += score[n]
            if valid:
                kept.update(sorted(valid, key=lambda n: -score[n])[: max(1, round(k_ratio * len(valid)))])
        for image in range(len(row.tiles)):
            own = [n for n in valid if n // (TILES * TOKENS) == image]
            if not kept.intersection(own):
                kept.add(max(own, key=lambda n: totals[n]))
        assert trimmed.samples[b].kept.tolist() == sorted(kept)
        assert trimmed.samples[b].visual_tokens == len(valid)
        assert trimmed.samples[b].kept_visual_tokens == len(kept)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_cache_holds_only_what_is_kept_and_bytes_add_up(policy):
    rows = BATCHES["mixed tiles"]
    model, inputs = tiny_model(), make_inputs(rows)
    cache = DynamicCache(config=model.config.text_config)
    with trim(model, policy) as trimmed:
        model(**inputs, past_key_values=cache, use_cache=True)
    longest = max(sample.kept_visual_tokens for sample in trimmed.samples)
    cross = [cache.layers[i] for i in (1, 3, 5)]
    assert all(layer.keys.shape == layer.values.shape == (4, 2, longest, 16) for layer in cross)
    held = sum(t.numel() * t.element_size() for layer in cross for t in (layer.keys, layer.values))
    assert held == sum(sample.cross_kv_bytes_allocated for sample in trimmed.samples)
    token_bytes = 2 * 2 * 16 * 4  # keys and values, kv heads, head dim, fp32
    for row, sample, real in zip(rows, trimmed.samples, inputs["attention_mask"].sum(-1).tolist(), strict=True):
        assert sample.visual_tokens == sum(row.tiles) * TOKENS
        assert sample.cross_kv_bytes_full == sample.visual_tokens * 3 * token_bytes
        assert sample.cross_kv_bytes == len(sample.kept) * 3 * token_bytes
        assert sample.cross_kv_bytes_allocated == longest * 3 * token_bytes
        assert sample.self_kv_bytes == real * 4 * token_bytes
        assert sample.keep_fraction == sample.kept_visual_tokens / sample.visual_tokens


def test_later_layers_project_kept_features_alone():
    model, inputs = tiny_model(), make_inputs(BATCHES["four tiles"])
    seen: dict[int, int] = {}
    for index in (1, 3, 5):
        projection = model.model.language_model.layers[index].cross_attn.k_proj
        projection.register_forward_pre_hook(lambda module, args, index=index: seen.update({index: args[0].shape[1]}))
    with trim(model, TrimmedLlama(0.1)) as trimmed:
        model(**inputs)
    kept = trimmed.samples[0].kept_visual_tokens
    assert kept < 4 * TOKENS
    assert seen == {1: 4 * TOKENS, 3: kept, 5: kept}


def test_padding_tiles_change_nothing_under_metas_rows():
    """Dropping their features is exact: with and without a second, empty image slot a sample comes out the same."""
    model = tiny_model()
    rows = [Row((2,))]
    alone = make_inputs(rows)
    together = {k: v[:1] for k, v in make_inputs([*rows, Row((1, 1), before=0, after=1)]).items()}
    together["pixel_values"][:, :1] = alone["pixel_values"]
    length = alone["input_ids"].shape[1]
    with trim(model, KeepAll()):
        one = model(**alone).logits
        other = model(**together).logits[:, -length:]
    assert together["pixel_values"].shape[1] == 2
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_text_only_rows_equal_the_language_model_alone():
    model = tiny_model()
    both = make_inputs([Row((3,)), Row((), before=6)], padding="left")
    length = int(both["attention_mask"][1].sum())
    text = {name: both[name][1:, -length:] for name in ("input_ids", "attention_mask")}
    with trim(model, TrimmedLlama(0.25)) as trimmed:
        together = model(**both).logits[1:, -length:]
        mixed = trimmed.samples[1]
        alone = model(**text).logits
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (mixed.visual_tokens, mixed.kept_visual_tokens, mixed.keep_fraction) == (0, 0, None)
    assert (trimmed.samples[0].visual_tokens, trimmed.samples[0].cross_kv_bytes_allocated) == (0, 0)
    assert trimmed.samples[0].self_kv_bytes == length * 4 * 2 * 2 * 16 * 4


def test_every_image_keeps_a_feature():
    model = tiny_model()
    inputs = make_inputs([Row((4, 1, 1, 1), before=1, after=1)])
    with trim(model, TrimmedLlama(k_ratio=0.001)) as trimmed:
        model(**inputs)
    images = set((trimmed.samples[0].kept // (TILES * TOKENS)).tolist())
    assert images == {0, 1, 2, 3}


def test_a_forward_without_masks_sees_every_feature():
    """With no mask and several rows, sdpa would go causal and silently cut the keys (mllama: is_causal)."""
    inputs = {
        k: v for k, v in make_inputs([Row((4,), before=0)]).items() if k not in ("cross_attention_mask", "attention_mask")
    }
    results = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(attention=attention)
        with trim(model, TrimmedLlama(0.2)) as trimmed:
            results.append((model(**inputs).logits, trimmed.samples[0].kept))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(results[0][1], results[1][1])


def test_leaving_restores_the_model_also_after_an_exception():
    model, inputs = tiny_model(), make_inputs(BATCHES["mixed tiles"])
    before = model(**inputs).logits

    def fail_inside() -> None:
        with trim(model, TrimmedLlama(0.1)):
            model(**inputs)
            raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        fail_inside()
    assert torch.equal(model(**inputs).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == []


def test_a_forward_that_fails_does_not_spoil_the_next():
    model, inputs = tiny_model(), make_inputs(BATCHES["four tiles"])
    with trim(model, TrimmedLlama(0.2)) as trimmed:
        wanted = model(**inputs).logits
        with pytest.raises(RuntimeError):
            model(**{**inputs, "cross_attention_mask": inputs["cross_attention_mask"][..., :2]})
        assert torch.equal(model(**inputs).logits, wanted)
    assert len(trimmed.samples) == 1


def test_random_does_not_depend_on_neighbours():
    model = tiny_model()
    row, other = Row((3,)), Row((1, 4), before=0)
    with trim(model, Random(0.3)) as trimmed:
        trimmed.sample_ids = ["a"]
        model(**make_inputs([row]))
        alone = trimmed.samples[0].kept
        trimmed.sample_ids = ["b", "a"]
        model(**make_inputs([other, row]))
        beside = trimmed.samples[1].kept
        trimmed.sample_ids = ["c"]
        model(**make_inputs([row]))
        renamed = trimmed.samples[0].kept
    assert torch.equal(alone, beside)
    assert not torch.equal(alone, renamed)
    assert len(alone) == round(0.3 * 3 * TOKENS)


def test_beams_and_several_answers_a_prompt():
    model, inputs = tiny_model(), make_inputs(BATCHES["mixed tiles"])
    with trim(model, TrimmedLlama(0.2)) as trimmed:
        trimmed.sample_ids = list("abcd")
        model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False)
    assert len(trimmed.samples) == 8
    assert torch.equal(trimmed.samples[0].kept, trimmed.samples[1].kept)


def test_misuse_is_refused():
    model, inputs = tiny_model(), make_inputs(BATCHES["four tiles"])
    with pytest.raises(ValueError, match="rows='llama'"), trim(model, KeepAll(), rows="llama"):
        pass
    with pytest.raises(TypeError, match="MllamaForConditionalGeneration"), trim(torch.nn.Linear(1, 1), KeepAll()):
        pass
    with pytest.raises(TypeError, match="TrimmedLlama"), trim(model, TrimmedLlama):
        pass
    with trim(model, KeepAll()), pytest.raises(ValueError, match="already"), trim(model, KeepAll()):
        pass
    with trim(model, Random(0.5)) as trimmed:
        trimmed.sample_ids = ["a", "b"]
        with pytest.raises(ValueError, match="2 ids for a batch of 1"):
            model(**inputs)
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    with trim(model, KeepAll()):
        with pytest.raises(ValueError, match="not filled inside"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(ValueError, match="fresh cache"):
            model(**inputs, past_key_values=cache)
        static = StaticCache(config=model.config.text_config, max_cache_len=TILES * TOKENS)
        with pytest.raises(ValueError, match="dynamic cache"):
            model(**make_inputs(BATCHES["one tile"]), past_key_values=static, use_cache=True)
    for bad in (0, -0.5, 1.5, float("nan")):
        for make in (TrimmedLlama, Random, Grid):
            with pytest.raises(ValueError, match=r"share of the features"):
                make(bad)
