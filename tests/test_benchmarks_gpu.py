"""The GPU benchmark on a CPU: its model, its roofline, the state that decode steps are timed in, its page, a tiny run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import captioning, decode
from benchmarks.gpu.amounts import SECTIONS, TINY_GPU
from benchmarks.gpu.attention import AttentionShapes, compare_backends
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.captioning import Captioning, measure_captioning
from benchmarks.gpu.conditions import conditions_of
from benchmarks.gpu.decode import POLICIES, Crowd, measure_decode
from benchmarks.gpu.model import ELEVEN_B, build_on
from benchmarks.gpu.page import markdown
from benchmarks.gpu.prefill import measure_prefill
from benchmarks.gpu.questions import measure_questions
from benchmarks.gpu.results import GOALS, ratios
from benchmarks.gpu.roofline import Rates, measure_rates
from benchmarks.gpu.tower import random_images
from benchmarks.model import TINY, build_model, build_processor
from benchmarks.timing import Pass
from trimming.costs import Cost, Costs
from trimming.engine import prefill as engine_prefill

CPU = torch.device("cpu")


def replace_amounts(bench: Bench, **changes: Any) -> Bench:
    bench.amounts = replace(bench.amounts, **changes)
    return bench


def page_of(bench: Bench, sections: dict[str, Any]) -> dict[str, Any]:
    """A result as the store writes it."""
    whole = {"rehearsal": True, "ratios": ratios(sections), "goals": GOALS, "sections": sections}
    return {**whole, "conditions": conditions_of(bench)}


@pytest.fixture
def bench() -> Bench:
    made = Bench(device=CPU, amounts=TINY_GPU, save=lambda: None, say=lambda line: None)
    made.rates = Rates(1e9, 1e9)
    return made


# ---- model ------------------------------------------------------------------------------------------------------------------


def test_the_geometry_is_llamas_and_its_weights_are_bf16() -> None:
    # A meta device has no memory: what is made there shows that nothing is made elsewhere.
    model = build_on(torch.device("meta"), ELEVEN_B, build_processor(ELEVEN_B), seed=0)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert all(buffer.device.type == "meta" for buffer in model.buffers())
    assert 2 * model.num_parameters() == sum(Costs(model.config).weights.values())
    assert model.num_parameters() == pytest.approx(10.67e9, rel=0.01)
    text, vision = model.config.text_config, model.config.vision_config
    assert text.cross_attention_layers == [3, 8, 13, 18, 23, 28, 33, 38]
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (40, 4096, 128_256)
    assert (vision.image_size, vision.num_hidden_layers, vision.num_global_layers) == (560, 32, 8)
    assert Costs(model.config).tokens == 1601


def test_the_model_differs_from_the_usual_one_in_dtype_alone() -> None:
    processor = build_processor(TINY)
    made, usual = build_on(CPU, TINY, processor, seed=0), build_model(TINY, processor, seed=0)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert {name: p.shape for name, p in made.named_parameters()} == {name: p.shape for name, p in usual.named_parameters()}
    buffers = dict(usual.named_buffers())
    assert buffers
    for name, buffer in made.named_buffers():
        torch.testing.assert_close(buffer, buffers.pop(name), rtol=0, atol=0)
    assert not buffers
    gates = [name for name, _ in made.named_parameters() if "gate" in name and "gate_proj" not in name]
    assert gates
    for name in gates:
        torch.testing.assert_close(made.get_parameter(name).float(), usual.get_parameter(name), rtol=0.01, atol=0)
    assert made.generation_config.eos_token_id is None
    assert made.config.text_config._attn_implementation == "sdpa"


# ---- roofline ---------------------------------------------------------------------------------------------------------------


def test_the_slower_of_two_rates_holds_a_call_up() -> None:
    rates = Rates(matmul=100.0, copy=10.0)
    calls = [Cost(operations=200, bytes=10), Cost(operations=100, bytes=30)]
    assert rates.floor(calls) == 2.0 + 3.0
    assert [rates.bound(call) for call in calls] == ["matmul", "copy"]


def test_rates_are_of_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.roofline.queued_seconds", lambda device, run, count: run() is None or 0.5)
    rates = measure_rates(CPU, side=8, copy_bytes=100, repeats=2)
    assert rates == Rates(matmul=2 * 8**3 / 0.5, copy=2 * 100 / 0.5)


# ---- decode -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_the_crowd_stands_where_it_is_said_to(bench: Bench, name: str) -> None:
    encoded = decode._encode(bench)
    crowd = Crowd(bench, POLICIES[name], encoded)
    engine, context = crowd.engine, bench.amounts.prompt + bench.amounts.said
    with torch.inference_mode():
        for batch in (1, 3, crowd.largest):
            measured = crowd.measure(batch)
            assert len(engine.decode.running) == batch
            assert engine.decode.positions == [context] * batch
            segments = [s.segment for s in engine.decode.running]
            assert len({id(segment) for segment in segments}) == batch
            # Four tiles of ten visual tokens.
            assert {extent.rows for s in segments if s for extent in s.layers} == {
                {"full": 40, "half": 20, "quarter": 10}[name]
            }
            assert measured["tokens_per_second"] == pytest.approx(batch / measured["seconds"])
    assert not engine.statistics.images_encoded
    # One more does not fit.
    assert not engine.memory.open_slots(1) or engine.memory.allocate([crowd.kept] * 3) is None


def test_a_step_is_compared_with_the_cost_of_its_own_batch(bench: Bench) -> None:
    with torch.inference_mode():
        crowd = Crowd(bench, POLICIES["half"], decode._encode(bench))
        one, four = crowd.measure(1), crowd.measure(4)
    assert four["kv_bytes"] == 4 * one["kv_bytes"]
    # Weights are read once.
    assert one["bytes"] < four["bytes"] < 4 * one["bytes"]
    assert four["operations"] == 4 * one["operations"]
    floor = max(four["operations"], four["bytes"]) / 1e9
    assert four["roofline_seconds"] == floor
    assert four["roofline_share"] == pytest.approx(floor / four["seconds"])


def test_a_batch_that_runs_out_of_memory_ends_its_policy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Crowd.measure

    def measure(self: Crowd, batch: int) -> dict[str, Any]:
        if batch == 4:
            raise torch.OutOfMemoryError("no")
        return whole(self, batch)

    monkeypatch.setattr(Crowd, "measure", measure)
    out: dict[str, Any] = {}
    measure_decode(bench, out)
    for name in POLICIES:
        assert list(out["policies"][name]["batches"]) == ["2", "4"]
        assert out["policies"][name]["batches"]["4"] == {"error": "out of memory"}


def test_nothing_begins_after_the_end(bench: Bench) -> None:
    bench.deadline = 0.0
    sections: dict[str, Any] = {}
    for name, measure in (
        ("prefill", measure_prefill),
        ("decode", measure_decode),
        ("captioning", measure_captioning),
        ("questions", measure_questions),
    ):
        sections[name] = {"status": "done", "took": 0.0, "conditions": conditions_of(bench)}
        measure(bench, sections[name])
    assert [one["batches"] for one in sections["decode"]["policies"].values()] == [{}, {}, {}]
    assert sections["captioning"]["contenders"] == sections["captioning"]["sweep"] == sections["questions"]["contenders"] == {}
    page = markdown(page_of(bench, sections))
    assert "| ratio |" not in page
    assert "cannot be made" not in page


# ---- prefill ----------------------------------------------------------------------------------------------------------------


def test_prefills_are_repeated_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt has an image of its own, whose keys and values each run projects anew and lets go of."""
    projected: list[int] = []
    project = engine_prefill.cross_projections

    def count(attention: Any, features: torch.Tensor) -> Any:
        projected.append(len(features))
        return project(attention, features)

    monkeypatch.setattr(engine_prefill, "cross_projections", count)
    out: dict[str, Any] = {}
    measure_prefill(replace_amounts(bench, prefills=(3,), prefill_runs=4), out)
    # Two tiles of ten visual tokens, three prompts, three cross-attention layers; once to warm up, and for the profile.
    assert projected[: 3 * (1 + 4)] == [60] * 15
    assert set(projected) == {60, 30}
    full, half = (out["policies"][name]["batches"]["3"] for name in ("full", "half"))
    assert (full["kept"], half["kept"]) == (20, 10)
    assert half["operations"] < full["operations"]
    assert out["farthest_points"]["launches"] > 0
    assert out["profile"]["kernels"] > out["profile"]["longest"][0]["calls"]
    assert len(out["profile"]["longest"]) == 10


# ---- tower, captioning and questions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_random_images_have_their_tiles(bench: Bench, tiles: int) -> None:
    first, second = random_images(bench, tiles, 2)
    assert first.pixels.shape == (tiles, 3, 42, 42)
    assert first.key != second.key
    assert not first.pixels.equal(second.pixels)
    # (1, 1), (1, 2) and (1, 4) of the processor's list.
    assert first.ratio_id == {1: 1, 2: 2, 4: 4}[tiles]


def test_a_backend_that_is_not_there_is_named(bench: Bench) -> None:
    found = compare_backends(bench)
    assert found["flash"]["prefill_new"] > 0
    assert set(found["cudnn"]) == {"error"}


def test_attention_is_counted_by_shape() -> None:
    short, long = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)
    with AttentionShapes() as shapes:
        for states in (short, long, short):
            torch.nn.functional.scaled_dot_product_attention(states, states, states)
    assert (shapes.calls, len(shapes.shapes)) == (3, 2)


def test_every_round_has_images_of_its_own_and_encodes_all_of_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    whole = captioning.engine_pass

    def engine_pass(bench: Bench, engine: Any, requests: Any) -> Pass:
        seen.append(tuple(image.key for request in requests for image in request.images))
        return whole(bench, engine, requests)

    monkeypatch.setattr(captioning, "engine_pass", engine_pass)
    out: dict[str, Any] = {}
    made = Captioning(replace_amounts(bench, rounds=2), out)
    made.measure()
    lengths = [row.length for row in made.load(2).rows]
    assert set(out["contenders"]) == set(made.tokens) == {"engine", "peer", "engine, trimmed", "engine, real tiles"}
    for name in out["contenders"]:
        assert [len(row) for row in made.tokens[name]] == lengths
    assert {one["passes"] for one in out["contenders"].values()} == {2}
    # In each of two rounds a warm-up of either policy and three ways.
    assert len(seen) == 2 * (2 + 3)
    keys = [set(each) for each in seen]
    warm, first, second = keys[0], keys[1], keys[6]
    assert [keys.count(each) for each in (warm, first, second)] == [4, 3, 3]
    assert not warm & first
    assert not first & second
    for name in ("engine", "engine, trimmed", "engine, real tiles"):
        one = out["contenders"][name]
        assert one["images_encoded"] == 6
        # Since the pass began, not since the engine was made; the mean of both rounds.
        assert one["decode_tokens"] == (made.load(1).tokens + made.load(2).tokens) / 2 - 6
    assert out["contenders"]["engine, trimmed"]["keep_fraction"] == pytest.approx(0.5, abs=0.1)
    assert out["same"]["first_tokens"] >= 0.5
    assert out["attention"]["trimmed_shapes"] > 1


def test_a_batch_size_that_does_not_fit_is_no_contender(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Captioning._peer_pass

    def peer_pass(self: Captioning, load: Any, batches: Any) -> Pass:
        if len(batches[0]["input_ids"]) == 4:
            raise torch.OutOfMemoryError("no")
        return whole(self, load, batches)

    monkeypatch.setattr(Captioning, "_peer_pass", peer_pass)
    out: dict[str, Any] = {}
    measure_captioning(bench, out)
    assert out["sweep"]["4"]["error"] == "out of memory"
    assert out["peer_batch"] == 2


def test_questions_say_what_was_held(bench: Bench) -> None:
    out: dict[str, Any] = {}
    measure_questions(bench, out)
    ways = [out["contenders"][name] for name in ("engine", "engine, trimmed", "engine, trimmed by question")]
    full, trimmed, by_question = (one["peak_cross_kv_bytes"] for one in ways)
    assert out["rows"] == 5 * out["images"]
    assert {one["images_encoded"] for one in ways} == {out["images"]}
    # Five rows share what each of them counts.
    for one in ways[:2]:
        assert one["cross_kv_bytes_of_rows"] == pytest.approx(5 * one["peak_cross_kv_bytes"], rel=0.3)
    assert trimmed < full < by_question


# ---- results ----------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_what_is_there() -> None:
    def taking(seconds: float) -> dict[str, Any]:
        return {"seconds": {"median": seconds}}

    batches = {"8": {"roofline_share": 0.5}, "32": {"error": "out of memory"}}
    sections: dict[str, Any] = {
        "tower": {"images": 8, "tiles": {"4": {"all": {"roofline_share": 0.7}}}},
        "prefill": {"policies": {"full": {"batches": {"16": {"roofline_share": 0.4}}}}},
        "decode": {"policies": {"full": {"batches": batches}, "half": {"batches": {}}}},
        "captioning": {"contenders": {"peer": taking(9.0), "engine": taking(3.0)}},
    }
    assert ratios(sections) == {
        "captioning_engine_over_peer": 3.0,
        "prefill_roofline_share": {"full": {"16": 0.4}},
        "decode_roofline_share": {"full": {"8": 0.5}},
        "tower_roofline_share": {"4": {"all": 0.7}},
    }
    assert ratios({}) == {}
    assert ratios({"captioning": {}, "tower": {"error": "no"}}) == {}


def test_the_page_stands_whatever_a_section_reached(bench: Bench) -> None:
    end = {
        "status": "failed",
        "took": 1.0,
        "error": "RuntimeError: a | b\nc",
        "traceback": "…",
        "conditions": conditions_of(bench),
    }
    cases = [{}, {"images": 8}, {"tiles": {"1": {}}}, {"contenders": {"engine": {"error": "no"}}}, {"policies": {"full": {}}}]
    for case in cases:
        page = markdown(page_of(bench, {name: {**end, **case} for name in SECTIONS}))
        assert page.startswith("# The GPU kit")
        assert "RuntimeError: a \\| b c" in page
