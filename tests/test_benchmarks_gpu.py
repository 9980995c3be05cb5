"""The GPU benchmark on a CPU: its model, its roofline, the state that decode steps are timed in, its page, a tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_decode
from benchmarks.gpu.amounts import TINY_GPU, GpuAmounts
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.captioning import Captioning, measure_captioning
from benchmarks.gpu.decode import POLICIES, Crowd, measure_decode
from benchmarks.gpu.model import ELEVEN_B, build_on
from benchmarks.gpu.page import markdown
from benchmarks.gpu.results import conditions_of, ratios, result
from benchmarks.gpu.tower import random_images
from benchmarks.model import TINY, build_model, build_processor
from benchmarks.gpu.roofline import Rates, measure_rates
from benchmarks.timing import Pass
from trimming.costs import Cost, Costs
from trimming.engine.sequence import Encoded

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Bench:
    processor = build_processor(TINY)
    return Bench(
        device=CPU,
        amounts=replace(TINY_GPU, minutes=10.0),
        size=TINY,
        model=build_on(CPU, TINY, processor, seed=0),
        processor=processor,
        rates=Rates(1e9, 1e9),
        save=lambda: None,
        say=lambda line: None,
        began=gpu.time.monotonic(),
    )


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
    encoded = gpu_decode._encode(bench)
    crowd = Crowd(bench, POLICIES[name], encoded)
    engine, context = crowd.engine, bench.amounts.prompt + bench.amounts.said
    for batch in (1, 3, crowd.largest):
        measured = crowd.measure(batch)
        assert len(engine.decode.running) == batch
        assert engine.decode.positions == [context] * batch
        segments = [s.segment for s in engine.decode.running]
        assert len({id(segment) for segment in segments}) == batch
        # Four tiles of ten visual tokens.
        assert {extent.rows for s in segments if s for extent in s.layers} == {40 if name == "full" else 20}
        assert measured["tokens_per_second"] == pytest.approx(batch / measured["seconds"]["median"])
    assert not engine.statistics.images_encoded
    # One more does not fit.
    assert not engine.memory.open_slots(1) or engine.memory.allocate([crowd.kept] * 3) is None


def test_a_step_is_compared_with_the_cost_of_its_own_batch(bench: Bench) -> None:
    crowd = Crowd(bench, POLICIES["half"], gpu_decode._encode(bench))
    one, four = crowd.measure(1), crowd.measure(4)
    assert four["kv_bytes"] == 4 * one["kv_bytes"]
    # Weights are read once.
    assert one["bytes"] < four["bytes"] < 4 * one["bytes"]
    assert four["operations"] == 4 * one["operations"]
    floor = max(four["operations"], four["bytes"]) / 1e9
    assert four["roofline_seconds"] == floor
    assert four["roofline_share"] == pytest.approx(floor / four["seconds"]["median"])


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
        assert list(out[name]["batches"]) == ["1", "2", "4"]
        assert out[name]["batches"]["4"] == {"error": "out of memory"}


def test_nothing_begins_after_the_end(bench: Bench) -> None:
    bench.amounts = replace(bench.amounts, minutes=0.0)
    decode: dict[str, Any] = {}
    measure_decode(bench, decode)
    assert decode["full"]["batches"] == decode["half"]["batches"] == {}
    captioning: dict[str, Any] = {}
    measure_captioning(bench, captioning)
    assert captioning["contenders"] == captioning["sweep"] == {}
    assert "| ratio |" not in markdown(result({"decode": decode, "captioning": captioning}, conditions_of(bench)))


# ---- tower and captioning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_random_images_have_their_tiles(bench: Bench, tiles: int) -> None:
    first, second = random_images(bench, tiles, 2)
    assert first.pixels.shape == (tiles, 3, 42, 42)
    assert first.key != second.key
    assert not first.pixels.equal(second.pixels)
    # (1, 1), (1, 2) and (1, 4) of the processor's list.
    assert first.ratio_id == {1: 1, 2: 2, 4: 4}[tiles]


def test_every_timed_pass_encodes_every_image(bench: Bench) -> None:
    bench.amounts = replace(bench.amounts, rounds=2)
    out: dict[str, Any] = {}
    captioning = Captioning(bench, out)
    captioning.measure()
    lengths = [row.length for row in captioning.load.rows]
    assert set(out["contenders"]) == {"engine", out["peer"], "engine, trimmed", "engine, real tiles"}
    for name, said in captioning.tokens.items():
        assert [len(row) for row in said] == lengths
        assert out["contenders"][name]["passes"] == 2
    for name in ("engine", "engine, trimmed", "engine, real tiles"):
        one = out["contenders"][name]
        assert one["images_encoded"] == 6
        # Since the pass began, not since the engine was made.
        assert one["decode_tokens"] == sum(lengths) - 6
    assert out["contenders"]["engine, trimmed"]["keep_fraction"] == pytest.approx(0.5, abs=0.05)
    assert out["same"]["first_tokens"] >= 0.5


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
    assert out["peer"] == "peer 2"


# ---- results ----------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_what_is_there() -> None:
    def taking(seconds: float) -> dict[str, Any]:
        return {"seconds": {"median": seconds}}

    sections: dict[str, Any] = {
        "tower": {"images": 8, "4": {"all": {"roofline_share": 0.7}}},
        "decode": {"conditions": {}, "full": {"batches": {"8": {"roofline_share": 0.5}, "32": {"error": "out of memory"}}}},
        "captioning": {"peer": "peer 8", "contenders": {"peer 8": taking(9.0), "engine": taking(3.0)}},
    }
    assert ratios(sections) == {
        "captioning_engine_over_peer": 3.0,
        "decode_roofline_share": {"full": {"8": 0.5}},
        "tower_roofline_share": {"4": {"all": 0.7}},
    }
    assert ratios({}) == {}
    assert ratios({"captioning": {}, "tower": {"error": "no"}}) == {}


# ---- the program ------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "results")]) == 0
    assert capsys.readouterr() == ("no CUDA device: the GPU benchmark was skipped\n", "")
    assert not (tmp_path / "results").exists()


def test_a_cpu_takes_the_tiny_model_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--device", "cpu", "--output", str(tmp_path)])
    assert refused.value.code == 2
    assert "--size tiny" in capsys.readouterr().err


def test_help_needs_nothing_heavy() -> None:
    heavy = "import benchmarks.gpu, sys; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_neither_ray_nor_arrow_is_needed() -> None:
    """A lent machine need not have them."""
    needed = "import benchmarks.gpu.captioning, benchmarks.gpu.results, sys; print({'ray', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", needed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[], tuple[int, dict[str, Any]]]:
    def run() -> tuple[int, dict[str, Any]]:
        code = gpu.main(["--device", "cpu", "--size", "tiny", "--output", str(tmp_path)])
        return code, json.loads((tmp_path / "gpu.json").read_text())

    return run


def test_a_tiny_run_measures_everything(
    tiny: Callable[[], tuple[int, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, measured = tiny()
    assert code == 0
    found = measured["ratios"]
    assert found["captioning_engine_over_peer"] > 0
    assert list(found["decode_roofline_share"]) == ["full", "half"]
    assert list(found["decode_roofline_share"]["full"])[:3] == ["1", "2", "4"]
    decode = measured["decode"]
    for name in ("full", "half"):
        assert list(decode[name]["batches"])[-1] == str(decode[name]["largest"])
    assert decode["half"]["largest"] > decode["full"]["largest"] > 4
    assert {tiles: set(modes) for tiles, modes in found["tower_roofline_share"].items()} == {
        "1": {"all", "real"},
        "2": {"all", "real"},
        "4": {"all"},
    }
    assert measured["conditions"]["dtype"] == "bfloat16"
    page = (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    for said in (
        "captioning, engine with all features / peer | ≥ 3 |",
        "| half | 4 |",
        "The largest that fits, half",
        "| 2 | real |",
    ):
        assert said in page


def test_a_failed_section_costs_no_other(
    tiny: Callable[[], tuple[int, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bench: Bench, out: dict[str, Any]) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("benchmarks.gpu.decode.measure_decode", fail)
    monkeypatch.setattr("benchmarks.gpu.captioning.measure_captioning", fail)
    code, measured = tiny()
    assert code == 1
    assert measured["decode"] == {"error": "RuntimeError: out of order"}
    assert list(measured["ratios"]) == ["tower_roofline_share"]
    page = (tmp_path / "gpu.md").read_text()
    assert "**captioning broke off**: RuntimeError: out of order" in page
    assert "| 2 | real |" in page


def test_the_page_stands_whatever_a_section_reached(bench: Bench) -> None:
    at = conditions_of(bench)
    assert GpuAmounts().minutes < 9
    for sections in ({}, {"tower": {}}, {"tower": {"images": 8}, "decode": {"error": "no"}, "captioning": {"error": "no"}}):
        assert markdown(result(sections, at)).startswith("- **Machine**")
    assert isinstance(gpu_decode._encode(bench)[0], Encoded)
