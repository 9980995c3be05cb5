"""The committed weights: they load by the path that loads the published ones, and answer."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration

from demo import MODEL, PHOTO_MODEL, scenes
from demo.answerer import MAX_NEW_TOKENS, Answerer
from demo.architecture import build_model, build_processor
from demo.scenes import FLAT, PHOTO, Style
from demo.shards import Row, easy_vqa_rows, scene_rows
from demo.train import easy_vqa_texts
from pipeline.images import Normaliser
from pipeline.prompts import Prompter
from trimming import Clusters, KeepAll, Policy, Random, SampleTrim, TrimmedLlama, trim
from trimming.engine import Image as Encodable
from trimming.tower import Tower, TowerTiles


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(MODEL)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    easy = [row for image in easy_vqa_rows("test", 128) for row in image]
    return easy + [row for image in scene_rows("test", 20, scenes.KINDS) for row in image]


BOTH = pytest.mark.parametrize(("folder", "style"), [(MODEL, FLAT), (PHOTO_MODEL, PHOTO)], ids=["model", "photo-model"])


@BOTH
def test_weights_are_safetensors_of_at_most_16_mb(folder: Path, style: Style) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 16_000_000
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]


@BOTH
def test_from_pretrained_loads_the_architecture_of_the_code_without_a_missing_weight(folder: Path, style: Style) -> None:
    model, loading = MllamaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    fresh = build_model(build_processor(easy_vqa_texts(), style), patch=style.patch)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert model.config.to_diff_dict().keys() >= {"vision_config", "text_config"}
    assert model.config.text_config.cross_attention_layers == fresh.config.text_config.cross_attention_layers


@BOTH
def test_the_committed_processor_is_the_one_the_code_builds(folder: Path, style: Style) -> None:
    committed, built = AutoProcessor.from_pretrained(folder), build_processor(easy_vqa_texts(), style)
    assert committed.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert committed.tokenizer.padding_side == "left"
    assert committed.chat_template == built.chat_template
    picture = scenes.draw(scenes.scene("test", 0, style=style))
    ours, theirs = (p.image_processor([[picture]], return_tensors="pt")["pixel_values"] for p in (committed, built))
    assert ours.equal(theirs)


def test_it_answers_what_it_was_not_trained_on(answerer: Answerer, rows: list[Row]) -> None:
    """A floor far under what the README's table reports: it tells broken weights or prompts, not a worse training."""
    answered = list(answerer.answer(answerer.engine(KeepAll()), rows))
    easy = [a.right for a in answered if a.row.id.startswith("easy-vqa/")]
    scene = [a.right for a in answered if a.row.id.startswith("scenes/")]
    assert sum(easy) / len(easy) >= 0.9
    assert sum(scene) / len(scene) >= 0.6


def test_the_second_answers_about_scenes_over_photographs_and_loses_little_to_merging() -> None:
    """Floors far under the README's table."""
    answerer = Answerer(PHOTO_MODEL)
    rows = [row for image in scene_rows("test", 20, scenes.KINDS, PHOTO) for row in image]
    full, merged = (list(answerer.answer(answerer.engine(p), rows)) for p in (KeepAll(), Clusters(keep=0.1)))
    assert sum(a.right for a in full) >= 0.7 * len(rows)
    assert sum(a.right for a in merged) >= sum(a.right for a in full) - 0.03 * len(rows)
    longest = max(rows, key=lambda row: len(row.answer))
    assert len(answerer.processor.tokenizer(longest.answer, add_special_tokens=False).input_ids) < MAX_NEW_TOKENS


@pytest.mark.parametrize("tower_tiles", ["all", "pooled"])
@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(k_ratio=0.25), Random(keep=0.4)], ids=repr)
def test_the_engine_says_what_generate_says(
    answerer: Answerer, rows: list[Row], policy: Policy, tower_tiles: TowerTiles
) -> None:
    """What the table measures is the method: against ``generate`` under ``trim``, one row at a time, on both data sets."""
    some = [*rows[:10], *rows[-48:]]
    model = MllamaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    answered = list(answerer.answer(answerer.engine(policy, tower_tiles, kept_sets="question"), some))
    assert [a.row for a in answered] == some
    assert {a.tiles for a in answered} == {1, 2, 3, 4}
    for ours in answered:
        text, sample = plain_answer(answerer, model, ours.row, policy, tower_tiles)
        assert ours.said.text == text
        assert ours.said.kept == sample.kept.tolist()
        assert ours.said.cross_kv_bytes == sample.cross_kv_bytes
        assert ours.said.cross_kv_bytes_full == sample.cross_kv_bytes_full


def plain_answer(
    answerer: Answerer, model: MllamaForConditionalGeneration, row: Row, policy: Policy, tower_tiles: TowerTiles
) -> tuple[str, SampleTrim]:
    inputs = answerer.processor(
        images=[[Image.open(io.BytesIO(row.image)).convert("RGB")]],
        text=[Prompter(answerer.processor).text(row.question, images=1)],
        add_special_tokens=False,  # the template has begun the text
        return_tensors="pt",
    )
    # Under Meta's rows, as the weights were trained.
    with torch.inference_mode(), trim(model, policy, tower_tiles=tower_tiles) as trimmed:
        trimmed.sample_ids = [row.id]
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text: str = answerer.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), trimmed.samples[0]


def test_rows_about_an_image_go_in_together_in_whatever_order_they_come(answerer: Answerer, rows: list[Row]) -> None:
    some = rows[-18:]
    mixed = [some[image * 6 + question] for question in range(6) for image in range(3)]
    kept: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for name, order, kept_sets in (("image", some, "image"), ("mixed", mixed, "image"), ("question", some, "question")):
        sets = kept[name] = defaultdict(set)
        for answered in answerer.answer(answerer.engine(TrimmedLlama(k_ratio=0.1), kept_sets=kept_sets), order):
            sets[answered.row.path].add(tuple(answered.said.kept))
    assert {len(found) for found in kept["image"].values()} == {1}
    assert kept["mixed"] == kept["image"]
    assert min(len(found) for found in kept["question"].values()) > 1


def test_images_that_were_encoded_beforehand_take_an_engine_no_time(rows: list[Row]) -> None:
    answerer, some = Answerer(MODEL), rows[-12:]
    engine = answerer.engine(KeepAll())
    answerer.encode(engine, some)
    assert engine.batch.statistics.images_encoded == 2
    engine.batch.reset_statistics()
    assert len(list(answerer.answer(engine, some))) == 12
    assert engine.batch.statistics.images_encoded == 0
    assert engine.batch.seconds["tower"] == 0


def test_an_image_is_encoded_once_for_all_policies_but_apart_with_real_tiles(rows: list[Row]) -> None:
    answerer, some = Answerer(MODEL), rows[-12:]
    full, trimmed, real, again = (
        answerer.engine(KeepAll()),
        answerer.engine(TrimmedLlama(k_ratio=0.25)),
        answerer.engine(KeepAll(), "real"),
        answerer.engine(KeepAll()),
    )
    texts = [[a.said.text for a in answerer.answer(engine, some)] for engine in (full, trimmed, real, again)]
    assert [e.batch.statistics.images_encoded for e in (full, trimmed, real, again)] == [2, 0, 2, 0]
    assert texts[0] == texts[3]


def test_real_tiles_leave_images_of_four_tiles_as_they_are(answerer: Answerer, rows: list[Row]) -> None:
    answered = list(answerer.answer(answerer.engine(KeepAll()), rows[-120:]))
    real = list(answerer.answer(answerer.engine(KeepAll(), "real"), rows[-120:]))
    four = [pair for pair in zip(answered, real, strict=True) if pair[0].tiles == 4]
    assert four
    assert all(a.said == b.said for a, b in four)


def test_trimming_keeps_less_and_the_model_still_answers(answerer: Answerer, rows: list[Row]) -> None:
    answered = list(answerer.answer(answerer.engine(TrimmedLlama(k_ratio=0.25)), rows[:64]))
    assert all(0.25 <= (a.said.keep_fraction or 0) < 1 for a in answered)
    assert sum(a.right for a in answered) >= 0.8 * len(answered)


@BOTH
@torch.inference_mode()
def test_pooled_padding_does_not_drift_in_bfloat16(folder: Path, style: Style) -> None:
    """Against float32, features of held-out scenes are off by what they are off by with all of padding's rows."""
    answerer, images = Answerer(folder), defaultdict(list)
    for index in range(40):
        cut = answerer.tiler(scenes.draw(scenes.scene("test", index, style=style)))
        images[cut.ratio_id].append(Encodable(str(index), cut.pixels, cut.ratio_id))
    half = copy.deepcopy(answerer.model).bfloat16()

    def off(tower_tiles: TowerTiles, some: list[Encodable]) -> float:
        towers = (Tower(m, Normaliser(answerer.processor, m.device, m.dtype), tower_tiles) for m in (answerer.model, half))
        exact, found = (tower.encode(some).features.float() for tower in towers)
        return float((found - exact).norm() / exact.norm())

    assert {len(some[0].pixels) for some in images.values()} == {1, 2, 3, 4}
    for some in images.values():
        assert off("pooled", some) < 1.1 * off("all", some)
