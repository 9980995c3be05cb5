"""The benchmark's own parts: its workloads, its model's proportions, both sides, turns, page, and a tiny run of it all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks import cpu, workloads
from benchmarks.half import find_half
from benchmarks.model import BENCH, TINY, build_model, build_processor, words
from benchmarks.ours import Ours
from benchmarks.page import markdown
from benchmarks.peer import Peer
from benchmarks.results import captioning_stages
from benchmarks.timing import Pass, ratio, spread, take_turns
from benchmarks.workloads import Workload
from pipeline.images import Tiler
from pipeline.pictures import decode
from trimming import KeepAll, TrimmedLlama
from trimming.costs import Costs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def processor() -> MllamaProcessor:
    return build_processor(TINY)


@pytest.fixture(scope="module")
def model(processor: MllamaProcessor) -> MllamaForConditionalGeneration:
    return build_model(TINY, processor, seed=0)


@pytest.fixture(scope="module")
def captioning() -> Workload:
    return workloads.captioning(6, seed=0, size=TINY)


@pytest.fixture(scope="module")
def questions() -> Workload:
    return workloads.questions(3, seed=0, size=TINY)


@pytest.fixture(scope="module")
def ours(model: MllamaForConditionalGeneration, processor: MllamaProcessor) -> Ours:
    return Ours(model, processor, max_sequences=4, kv_bytes=1 << 24)


# ---- workloads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [workloads.captioning, workloads.questions, workloads.four_tiles])
def test_the_seed_decides_a_workload(make: Any) -> None:
    assert make(3, seed=1, size=TINY) == make(3, seed=1, size=TINY)
    assert make(3, seed=1, size=TINY) != make(3, seed=2, size=TINY)


@pytest.mark.parametrize("size", [BENCH, TINY])
def test_images_have_the_tiles_that_they_are_made_for(size: Any) -> None:
    load = workloads.captioning(20, seed=0, size=size)
    tiler = Tiler(build_processor(size))
    assert tuple(len(tiler(decode(file)).pixels) for file in load.images) == load.tiles
    assert Counter(load.tiles) == {2: 14, 1: 3, 4: 3}
    assert len(set(load.images)) == 20
    assert set(workloads.four_tiles(3, seed=0, size=size).tiles) == {4}


def test_captioning_has_one_prompt_and_lengths_of_8_to_96(processor: MllamaProcessor) -> None:
    load = workloads.captioning(40, seed=0, size=TINY)
    (prompt,) = {row.prompt for row in load.rows}
    assert [row.image for row in load.rows] == list(range(40))
    assert len(ids(processor, prompt)) == workloads.CAPTION_PROMPT
    for block in (load.rows[:20], load.rows[20:]):
        lengths = sorted(row.length for row in block)
        assert (lengths[0], lengths[-1]) == (8, 96)
        assert sum(lengths) / 20 == pytest.approx(52, abs=0.5)


def test_questions_come_five_an_image(processor: MllamaProcessor) -> None:
    load = workloads.questions(16, seed=0, size=TINY)
    assert [row.image for row in load.rows] == [i for i in range(16) for _ in range(5)]
    assert Counter(row.length for row in load.rows) == dict.fromkeys(range(1, 17), 5)
    assert {len(ids(processor, row.prompt)) for row in load.rows} == set(range(20, 41))


def test_a_part_of_a_workload_has_the_images_it_needs() -> None:
    load = workloads.questions(4, seed=0, size=TINY)
    part = load.first(7)
    assert (len(part.rows), part.images, part.tiles) == (7, load.images[:2], load.tiles[:2])
    assert {row.length for row in part.cut(1).rows} == {1}


def ids(processor: MllamaProcessor, prompt: str) -> list[int]:
    found: list[int] = processor.tokenizer(f"<|image|><|begin_of_text|>{prompt}", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.unk_token_id not in found
    return found


# ---- model ------------------------------------------------------------------------------------------------------------------


def test_the_model_has_the_proportions_that_are_asked_for() -> None:
    processor = build_processor(BENCH)
    model = build_model(BENCH, processor, seed=0)
    text = model.config.text_config
    costs = Costs(model.config, itemsize=4)
    assert costs.tokens == 257
    assert text.hidden_size == 512
    assert (len(text.cross_attention_layers), text.num_hidden_layers) == (8, 20)
    assert len(set(words(BENCH))) == text.vocab_size - 5

    load = workloads.captioning(20, seed=0, size=BENCH)
    assert 0.60 <= captioning_stages(load, costs, "all").tower_share < 0.65


def test_images_decide_outputs_and_no_special_token_is_said(ours: Ours, captioning: Workload) -> None:
    # All prompts are the same.
    said = ours(captioning.cut(16)).tokens
    assert len(set(map(tuple, said))) > 1
    assert min(token for row in said for token in row) >= 5


# ---- both sides -------------------------------------------------------------------------------------------------------------


def test_the_peer_says_what_generate_says_row_by_row(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, questions: Workload
) -> None:
    done = Peer(model, processor)(questions, 4)
    assert [len(row) for row in done.tokens] == [row.length for row in questions.rows]
    for row, said in zip(questions.rows, done.tokens, strict=True):
        image = decode(questions.images[row.image])
        inputs = processor(
            images=[[image]],
            text=[f"<|image|><|begin_of_text|>{row.prompt}"],
            return_tensors="pt",
            add_special_tokens=False,
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=row.length)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == said
    assert min(done.preparing, done.tower, done.generation) > 0
    assert done.preparing + done.tower + done.generation < done.seconds
    assert not model.model.vision_model._forward_hooks
    assert not model.model.multi_modal_projector._forward_pre_hooks


@pytest.mark.parametrize("load", ["captioning", "questions"])
def test_the_engine_says_what_the_peer_says(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, ours: Ours, load: str, request: pytest.FixtureRequest
) -> None:
    workload: Workload = request.getfixturevalue(load)
    peer = Peer(model, processor)(workload, 5)
    images, rows = len(workload.images), len(workload.rows)
    static = ours(workload, batch_size=5, reuse=False)
    assert static.tokens == peer.tokens
    assert static.measured["images_encoded"] == rows
    # Finished rows go on until their batch is done, and the batch's first tokens come from its prefill.
    batches = [workload.rows[i : i + 5] for i in range(0, rows, 5)]
    assert static.measured["decode_tokens"] == sum(len(b) * (max(row.length for row in b) - 1) for b in batches)
    for done in (ours(workload, batch_size=5), ours(workload)):
        assert done.tokens == peer.tokens
        assert done.measured["images_encoded"] == images
    assert done.measured["decode_tokens"] == sum(row.length - 1 for row in workload.rows)
    assert done.preparing + done.tower + done.generation < done.seconds


def test_half_of_the_features(ours: Ours, captioning: Workload) -> None:
    half = find_half(ours, captioning)
    # Ten features a tile: few steps between one fraction and the next.
    assert half.keep_fraction == pytest.approx(0.5, abs=0.05)
    trimmed, full = ours(captioning, half.policy), ours(captioning, KeepAll())
    assert trimmed.measured["keep_fraction"] == pytest.approx(half.keep_fraction)
    assert full.measured["keep_fraction"] == 1
    assert trimmed.measured["peak_cross_kv_bytes"] < full.measured["peak_cross_kv_bytes"]
    assert half.policy == TrimmedLlama(k_ratio=half.k_ratio)


# ---- turns and page ---------------------------------------------------------------------------------------------------------


def test_turns_go_back_and_forth_and_end_in_time() -> None:
    order: list[str] = []
    asked: list[float] = []

    def contender(name: str) -> Pass:
        order.append(name)
        return a_pass(1.0)

    def more(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) < 3

    passes = take_turns({name: partial(contender, name) for name in "abc"}, rounds=5, more=more)
    assert "".join(order) == "abccbaabc"
    assert asked == [3.0, 3.0, 3.0]
    assert {name: len(taken) for name, taken in passes.items()} == {"a": 3, "b": 3, "c": 3}

    order.clear()
    asked.clear()
    passes = take_turns({name: partial(contender, name) for name in "abc"}, rounds=5, more=more, once=["b"])
    assert "".join(order) == "abccaac"
    assert asked == [2.0, 2.0, 2.0]


def test_ratios_are_of_medians_and_their_spread_of_rounds() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratio([4.0, 6.0, 5.0], [2.0, 2.0, 2.5]) == {"median": 2.5, "min": 2.0, "max": 3.0}


def a_pass(seconds: float) -> Pass:
    return Pass(seconds=seconds, preparing=0.0, tower=0.0, generation=seconds, tokens=[])


def a_result() -> dict[str, Any]:
    def contender(speed: float, generation: float) -> dict[str, Any]:
        seconds = {"median": generation, "min": generation, "max": generation}
        return {"images_per_second": speed, "generation_seconds": seconds, "keep_fraction": 0.498, "peak_sequences": 8.0}

    load = {
        "images": 20,
        "tiles": {"1": 3, "2": 14, "4": 3},
        "rows": 20,
        "output_tokens": 1040,
        "k_ratio": 0.1,
        "peer": "peer 16",
        "peer_generation": "peer 32",
        "sweep": {"16": {"rows": 32, "rows_per_second": 2.5}, "32": {"rows": 32, "rows_per_second": 2.0}},
        "contenders": {
            "peer 16": contender(2.0, 10.0),
            "peer 32": contender(1.9, 9.0),
            "linear": contender(2.2, 8.5),
            "static": contender(2.5, 8.0),
            "continuous": contender(3.0, 4.5),
            "trimmed": contender(3.5, 3.0),
            "random": contender(3.6, 3.0),
            "real": contender(4.0, 4.5),
        },
        "same_output_rows": 0.95,
    }
    reused = {**load["contenders"], "reuse": contender(2.75, 8.0)}  # type: ignore[dict-item]
    decoding = {"decode_tokens_per_second": {"median": 300.0}, "keep_fraction": 0.5, "peak_sequences": 8.0}
    return {
        "ratios": dict.fromkeys(cpu_ratios(), 1.5),
        "spreads": {name: [1.4, 1.6] for name in cpu_ratios()},
        "goals": {
            "at_least": dict.fromkeys([name for name in cpu_ratios() if "peak" not in name], 1.4),
            "at_most": {"kv_peak_half_over_all": 0.55},
        },
        "captioning": load,
        "questions": {**load, "contenders": reused},
        "four_tiles": {"kv_budget_bytes": 80e6, "k_ratio": 0.11, "contenders": {"full": decoding, "half": decoding}},
        "selection": {"prefills": 40, "turns": 7, "cost": {"median": 0.021, "min": -0.01, "max": 0.04}},
        "ray_data": None,
        "conditions": {
            "hardware": "A CPU",
            "cores": 2,
            "threads": 2,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "dtype": "float32",
            "attention": "sdpa",
            "commit": "abc",
            "rounds": 3,
            "seed": 0,
            "model": {
                "parameters": 95e6,
                "hidden": 512,
                "cross_attention_layers": [1, 3],
                "layers": 20,
                "visual_tokens_per_tile": 257,
            },
            "captioning_operations": {"tower_share": 0.624, "tower_share_without_padding_tiles": 0.458},
        },
    }


def cpu_ratios() -> list[str]:
    """The keys that ``cpu.json`` promises."""
    engine = ["captioning_engine_over_peer", "captioning_generation_engine_over_peer", "questions_engine_over_peer"]
    return [*engine, "half_over_all", "kv_peak_half_over_all"]


def test_the_page_has_ratios_ladder_sweep_and_conditions() -> None:
    result = a_result()
    page = markdown(result)
    assert "| captioning, engine with all features / peer, end to end | ≥ 1.4 | **1.50** | 1.40 – 1.60 |" in page
    assert "| peak cross KV bytes, half / all, captioning, equal slots | ≤ 0.55 | **1.50** |" in page
    # Speed, speed over the peer's, and generation over the peer's best at that.
    assert "| + continuous batching | 3.00 | 1.50 | 2.00 | 3.00 | 1.50 | 2.00 |" in page
    assert "| + image reuse |  |  |  | 2.75 | 1.38 | 1.12 |" in page
    assert "| captioning, rows/s | 2.50 | 2.00 |" in page
    assert "costs 2.1% of prefill time (-1.0% to 4.0%)" in page
    assert "Ray" not in page
    result["ray_data"] = {
        "images": 20,
        "max_new_tokens": 32,
        "batch_size": 16,
        "peer": {"seconds": 60.0},
        "engine": {"seconds": 40.0},
        "same_texts": 1.0,
    }
    assert "peer (batches of 16) 60 s, `python -m jobs.caption` with all features 40 s" in markdown(result)


# ---- the program ------------------------------------------------------------------------------------------------------------


def test_help_needs_nothing_heavy() -> None:
    heavy = "import benchmarks.cpu, sys; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.ray
@pytest.mark.slow
def test_a_tiny_run_measures_everything(ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--quick", "--output", str(tmp_path / "results")]) == 0
    result = json.loads((tmp_path / "results/cpu.json").read_text())
    assert list(result["ratios"]) == cpu_ratios()
    assert all(value > 0 for value in result["ratios"].values())
    assert result["ratios"]["kv_peak_half_over_all"] < 0.7
    for name in ("captioning", "questions"):
        assert result[name]["same_output_rows"] == 1
        assert {"linear", "static", "continuous", "trimmed", "random", "real"} < set(result[name]["contenders"])
    assert set(result["questions"]["contenders"]) - set(result["captioning"]["contenders"]) >= {"reuse"}
    four = result["four_tiles"]["contenders"]
    assert four["full"]["peak_sequences"] == 2
    assert result["ray_data"]["same_texts"] == 1
    assert result["conditions"]["threads"] == torch.get_num_threads()
    page = (tmp_path / "results/cpu.md").read_text()
    assert page in capsys.readouterr().out
    assert "Through Ray Data" in page
