"""The committed weights: they load by the path that loads the published ones, and answer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration

from demo import scenes
from demo.answerer import Answerer
from demo.architecture import build_model, build_processor
from demo.shards import Row, easy_vqa_rows, scene_rows
from demo.train import easy_vqa_texts
from trimming import KeepAll, TrimmedLlama, trim

MODEL = Path(__file__).parent.parent / "demo/model"


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(MODEL)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    easy = [row for image in easy_vqa_rows("test", 128) for row in image]
    return easy + [row for image in scene_rows("test", 20, scenes.KINDS) for row in image]


def test_weights_are_safetensors_of_at_most_16_mb() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= 16_000_000
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]


def test_from_pretrained_loads_the_architecture_of_the_code_without_a_missing_weight() -> None:
    model, loading = MllamaForConditionalGeneration.from_pretrained(MODEL, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    fresh = build_model(build_processor(easy_vqa_texts()))
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert model.config.to_diff_dict().keys() >= {"vision_config", "text_config"}
    assert model.config.text_config.cross_attention_layers == fresh.config.text_config.cross_attention_layers


def test_the_committed_processor_is_the_one_the_code_builds() -> None:
    committed, built = AutoProcessor.from_pretrained(MODEL), build_processor(easy_vqa_texts())
    assert committed.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert committed.tokenizer.padding_side == "left"
    assert committed.chat_template == built.chat_template
    picture = scenes.draw(scenes.scene("test", 0))
    ours, theirs = (p.image_processor([[picture]], return_tensors="pt")["pixel_values"] for p in (committed, built))
    assert ours.equal(theirs)


def test_it_answers_what_it_was_not_trained_on(answerer: Answerer, rows: list[Row]) -> None:
    """A floor far under what the README's table reports: it tells broken weights or prompts, not a worse training."""
    answered = [a for start in range(0, len(rows), 64) for a in answerer.answer(rows[start : start + 64], KeepAll())]
    easy = [a.right for a in answered if a.row.id.startswith("easy-vqa/")]
    scene = [a.right for a in answered if a.row.id.startswith("scenes/")]
    assert sum(easy) / len(easy) >= 0.9
    assert sum(scene) / len(scene) >= 0.6


def test_remembered_images_change_no_answer(answerer: Answerer, rows: list[Row]) -> None:
    """Against a second model that encodes every image itself, one row at a time."""
    some = rows[124:134]
    model = MllamaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours = [answered.text for answered in answerer.answer(some, KeepAll())]
    assert ours == [plain_answer(answerer, model, row) for row in some]


def plain_answer(answerer: Answerer, model: MllamaForConditionalGeneration, row: Row) -> str:
    inputs = answerer.processor(
        images=[[Image.open(io.BytesIO(row.image)).convert("RGB")]],
        text=[answerer.prompt(row.question)],
        add_special_tokens=False,
        return_tensors="pt",
    )
    # Under Meta's rows, as the weights were trained.
    with torch.inference_mode(), trim(model, KeepAll()):
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text: str = answerer.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_trimming_keeps_less_and_the_model_still_answers(answerer: Answerer, rows: list[Row]) -> None:
    answered = answerer.answer(rows[:64], TrimmedLlama(k_ratio=0.25))
    assert all(0.25 <= (a.trim.keep_fraction or 0) < 1 for a in answered)
    assert sum(a.right for a in answered) >= 0.8 * len(answered)
