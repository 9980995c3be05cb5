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

from benchmarks import cpu, merging, workloads
from benchmarks.half import find_half
from benchmarks.language import Known, KnownBehind, LanguagePasses
from benchmarks.merging import measure_clustering
from benchmarks.model import BENCH, TINY, build_model, build_processor, words
from benchmarks.ours import Ours
from benchmarks.page import markdown, plot
from benchmarks.peer import Peer
from benchmarks.predicted import captioning_stages, fewer_over_all
from benchmarks.timing import Pass, quartiles, ratio, spread, take_turns
from benchmarks.workloads import Workload
from pipeline.images import Tiler
from pipeline.pictures import decode
from trimming import KeepAll, TrimmedLlama
from trimming.costs import Costs
from trimming.engine import KeptSets
from trimming.engine.images import encoded_images

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


def test_any_number_of_questions_an_image_are_the_same_questions() -> None:
    one, ten = (workloads.questions(20 // n, seed=0, size=TINY, per_image=n, tile_mix=(2,)) for n in (1, 10))
    assert [(row.prompt, row.length) for row in one.rows] == [(row.prompt, row.length) for row in ten.rows]
    assert [row.image for row in ten.rows] == [i for i in range(2) for _ in range(10)]
    assert (len(one.images), ten.tiles) == (20, (2, 2))


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


@pytest.mark.parametrize(("load", "kept_sets"), [("captioning", "image"), ("questions", "image"), ("questions", "question")])
def test_half_of_the_features(ours: Ours, load: str, kept_sets: KeptSets, request: pytest.FixtureRequest) -> None:
    workload: Workload = request.getfixturevalue(load)
    half = find_half(ours, workload, kept_sets)
    # Ten features a tile: few steps between one fraction and the next.
    assert half.keep_fraction == pytest.approx(0.5, abs=0.05)
    trimmed, full = ours(workload, half.policy, kept_sets=kept_sets), ours(workload, KeepAll())
    assert trimmed.measured["keep_fraction"] == pytest.approx(half.keep_fraction)
    assert full.measured["keep_fraction"] == 1
    held = ("peak_cross_kv_bytes", "cross_kv_byte_seconds", "cross_kv_bytes_read")
    assert all(full.measured[name] > 0 for name in held)
    shared = load == "captioning" or kept_sets == "image"
    assert (trimmed.measured["peak_cross_kv_bytes"] < full.measured["peak_cross_kv_bytes"]) == shared
    assert half.policy == TrimmedLlama(k_ratio=half.k_ratio)


# ---- behind the tower -------------------------------------------------------------------------------------------------------


def test_passes_behind_the_tower_encode_nothing(ours: Ours, questions: Workload) -> None:
    run = LanguagePasses(ours, questions)
    full, trimmed = run(KeepAll()), run(TrimmedLlama(k_ratio=0.2))
    assert full.tokens == ours(questions).tokens
    for done in (full, trimmed):
        assert done.measured["images_encoded"] == 0
        assert done.seconds == done.measured["prefill_seconds"] + done.measured["decode_seconds"]


@pytest.mark.parametrize("load", ["captioning", "questions"])
def test_what_is_known_beforehand_is_kept(ours: Ours, load: str, request: pytest.FixtureRequest) -> None:
    run = LanguagePasses(ours, request.getfixturevalue(load))
    trimmed = run.answer(TrimmedLlama(k_ratio=0.2))
    kept = {asked.id: one.trim.kept for asked, one in zip(run.requests, trimmed, strict=True)}
    for policy in (Known(kept), KnownBehind(kept)):
        for one, other in zip(run.answer(policy), trimmed, strict=True):
            assert one.trim.kept.tolist() == other.trim.kept.tolist()


def test_half_of_the_features_can_give_what_the_stages_can_save(
    questions: Workload, model: MllamaForConditionalGeneration
) -> None:
    measured = {"prefill_seconds": 2.0, "decode_seconds": 1.0}
    full = Pass(seconds=6.0, preparing=0.0, tower=3.0, generation=3.0, tokens=[], measured=measured)
    costs = Costs(model.config, itemsize=4)
    found = fewer_over_all(questions, costs, [full], 0.5)
    for low, high in found.values():
        assert 1 < low < high
    # Merged beforehand, the first cross-attention layer has less to do as well.
    merged = fewer_over_all(questions, costs, [full], 0.5, merged=True)
    assert merged["generation"][0] > found["generation"][0]
    # Seconds that are saved are the same ones, of a whole that is half as long.
    (end, _), (generation, _) = found["end_to_end"], found["generation"]
    assert 6 - 6 / end == pytest.approx(3 - 3 / generation)


def test_what_merging_takes_is_measured_turn_by_turn(ours: Ours, captioning: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = []
    monkeypatch.setattr(merging, "encoded_images", lambda *a: merged.extend(found := encoded_images(*a)) or found)
    found = measure_clustering(ours, captioning, turns=3)
    assert len(found) == 3
    assert all(share > 0 for share in found)
    assert len(merged) == 3 * len(captioning.images)
    assert any(one.members is not None for one in merged)


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
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


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
            "merged": contender(3.8, 2.5),
            "least": contender(3.9, 2.0),
            "real": contender(4.0, 4.5),
        },
        "same_output_rows": 0.95,
    }
    asked = {"reuse": contender(2.75, 8.0), "by question": contender(2.5, 4.0)}

    def timed(decode: float) -> dict[str, float]:
        held = {"peak_cross_kv_bytes": 20e6, "cross_kv_byte_seconds": 30e6, "cross_kv_bytes_read": 2e9}
        return {"prefill_seconds": 1.0, "decode_seconds": decode, "decode_tokens": 100.0, "peak_sequences": 8.0, **held}

    decoding = {"decode_tokens_per_second": {"median": 300.0}, "keep_fraction": 0.5, "peak_sequences": 8.0}
    return {
        "ratios": dict.fromkeys(cpu_ratios(), 1.5),
        "spreads": {name: [1.4, 1.6] for name in cpu_ratios()},
        "goals": {
            "at_least": dict.fromkeys([name for name in cpu_ratios() if not at_most(name)], 1.4),
            "at_most": dict.fromkeys(filter(at_most, cpu_ratios()), 0.55),
        },
        "captioning": load,
        "questions": {**load, "contenders": load["contenders"] | asked, "k_ratio_by_question": 0.12},  # type: ignore[operator]
        "four_tiles": {
            "kv_budget_bytes": 80e6,
            "k_ratio": 0.11,
            "contenders": dict.fromkeys(("full", "half", "merged"), decoding),
        },
        "predicted": {"questions_half_over_all": [1.03, 1.14]},
        "growth": {
            n: {"rows": 40, **dict.fromkeys(("full", "by question", "by image", "merged"), timed(1.0))} for n in ("1", "20")
        },
        "shares": {"1": timed(2.0), "0.5": timed(1.0), "0.1": timed(1.5)},
        "selection": {
            "prefills": 20,
            "turns": 16,
            "over_known": {name: {"median": 1.021, "low": 0.99, "high": 1.04} for name in ("one_question", "five_questions")},
            "over_known_behind": {
                name: {"median": 1.0, "low": 1.0, "high": 1.0} for name in ("one_question", "five_questions")
            },
        },
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
    kinds = ("captioning", "questions", "questions_generation", "decode", "captioning_kv_peak", "questions_kv_peak")
    fewer = [f"{name}_{share}_over_all" for share in ("half", "tenth") for name in kinds]
    towers = ["captioning_pooled_over_all", "captioning_whole_over_all", "questions_whole_over_all"]
    return [*engine, *fewer, *towers, "selection_one_question", "selection_five_questions", "clustering_over_tower"]


def at_most(name: str) -> bool:
    return "peak" in name or "selection" in name or "clustering" in name


def test_the_page_has_ratios_tables_and_conditions() -> None:
    result = a_result()
    page = markdown(result)
    assert "| captioning, engine with all features / peer, end to end | ≥ 1.4 |  | **1.50** | 1.40 – 1.60 |" in page
    assert (
        "five questions an image, half the features / all, end to end | ≥ 1.4 | 1.03 – 1.14 | **1.50** | 1.40 – 1.60 |" in page
    )
    assert "| peak cross KV held, half / all, five questions an image | ≤ 0.55 |  | **1.50** |" in page
    assert "one question an image | ≤ 0.55 |  | **1.500** | 1.400 – 1.600 |" in page
    # Speed, speed over the peer's, and generation over the peer's best at that.
    assert "| + continuous batching | 3.00 | 1.50 | 2.00 | 3.00 | 1.50 | 2.00 |" in page
    assert "| + image reuse |  |  |  | 2.75 | 1.38 | 1.12 |" in page
    assert "| captioning, rows/s | 2.50 | 2.00 |" in page
    assert "| in its place merging to a tenth | 3.80 | 1.90 | 3.60 |" in page
    assert "at most, whoever chooses, is 1.30 × end to end and 2.25 × at prefill and decode for captions" in page
    assert "8 with half of them and 8 with a tenth, merged: 300, 300, 300 tokens a second" in page
    assert "| 20 | 20.0 · 30.0 · 1.00 + 1.00 |" in page
    assert "| decode, s | 2.00 | 1.00 | 1.50 |" in page
    assert "the time does not fall at 10%." in page
    assert "take 2.1% (-1.0% to 4.0%) and 2.1% (-1.0% to 4.0%) longer" in page
    assert "questions, one set a question, K = 0.12 keeps 0.498" in page
    assert "Ray" not in page
    result["ray_data"] = {
        "images": 20,
        "max_new_tokens": 32,
        "batch_size": 16,
        "peer": {"seconds": 60.0},
        "engine": {"seconds": 40.0},
        "same_texts": 1.0,
    }
    said = "peer (batches of 16) 60 s, `python -m jobs.caption` with all features and all rows of the tower 40 s"
    assert said in markdown(result)


def test_the_plot_says_what_it_shows() -> None:
    svg = plot(a_result())
    assert svg.startswith("<?xml")
    assert "2.00 s at 100%, 1.00 s at 50%, 1.50 s at 10%." in svg


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
    for name in ("captioning", "questions"):
        assert result["ratios"][f"{name}_kv_peak_half_over_all"] < 0.7
        for share in ("half", "tenth"):
            low, high = result["predicted"][f"{name}_{share}_over_all"]
            assert 1 < low < high
    # The fewer images, the less is held, unless each question keeps a set of its own.
    held = {n: {name: one[name]["peak_cross_kv_bytes"] for name in set(one) - {"rows"}} for n, one in result["growth"].items()}
    assert list(held) == ["1", "2", "5", "10", "20"]
    assert held["20"]["merged"] < held["20"]["by image"] < held["20"]["full"] < held["20"]["by question"]
    assert held["1"]["by image"] == held["1"]["by question"] < held["1"]["full"]
    read = [one["cross_kv_bytes_read"] for one in result["shares"].values()]
    assert read == sorted(read, reverse=True)
    assert len(set(read)) == len(read)
    for name in ("captioning", "questions"):
        assert result[name]["same_output_rows"] == 1
        assert {"linear", "static", "continuous", "trimmed", "merged", "least", "real"} < set(result[name]["contenders"])
        assert {"pooled", "tower", "whole"} < set(result[name]["contenders"])
    assert set(result["questions"]["contenders"]) - set(result["captioning"]["contenders"]) >= {"reuse", "by question"}
    four = result["four_tiles"]["contenders"]
    assert four["full"]["peak_sequences"] == 2
    assert result["ray_data"]["same_texts"] == 1
    assert result["conditions"]["threads"] == torch.get_num_threads()
    page = (tmp_path / "results/cpu.md").read_text()
    assert page in capsys.readouterr().out
    assert (tmp_path / "results/cpu-decode.svg").exists()
    assert "Through Ray Data" in page
