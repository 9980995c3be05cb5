"""The demo model's make, before any training: sizes, tokenizer, prompts, tile counts."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from demo import easy_vqa, scenes
from demo.architecture import IMAGE_TOKEN, build_model, build_processor, start_from
from demo.scenes import FLAT, PHOTO, STYLES, Style
from demo.train import Trainer, easy_vqa_texts

SCENES = 200


@pytest.fixture(scope="module", params=STYLES)
def style(request: pytest.FixtureRequest) -> Style:
    return STYLES[request.param]


@pytest.fixture(scope="module")
def processor(style: Style) -> MllamaProcessor:
    return build_processor(easy_vqa_texts(), style)


@pytest.fixture(scope="module")
def model(processor: MllamaProcessor, style: Style) -> MllamaForConditionalGeneration:
    return build_model(processor, patch=style.patch)


def scene_texts(style: Style) -> set[str]:
    found = set()
    for index in range(SCENES):
        scene = scenes.scene("test", index, style=style)
        for kind in scenes.KINDS:
            found.update(scenes.question(scene, kind, random.Random(f"test/{index}/{kind}")) or ())
    return found


def test_easy_vqa_has_its_published_splits() -> None:
    train, test = easy_vqa.questions("train"), easy_vqa.questions("test")
    assert (len(train), len({q.path for q in train})) == (38_575, 4_000)
    assert (len(test), len({q.path for q in test})) == (9_673, 1_000)
    assert not {q.path for q in train} & {q.path for q in test}
    assert all(q.path.exists() for q in train + test)
    assert len({q.answer for q in train + test}) == 13


def test_kinds_of_easy_vqa_fit_their_answers() -> None:
    answers: dict[str, Counter[str]] = {"shape": Counter(), "color": Counter(), "presence": Counter()}
    for item in easy_vqa.questions("test"):
        answers[easy_vqa.kind(item.text)][item.answer] += 1
    assert set(answers["presence"]) == {"yes", "no"}
    assert set(answers["shape"]) == {"circle", "rectangle", "triangle"}
    assert len(answers["color"]) == 8
    assert not set(answers["color"]) & set(answers["shape"])


def test_the_model_is_a_real_mllama_of_the_wanted_shape(model: MllamaForConditionalGeneration, style: Style) -> None:
    vision, text = model.config.vision_config, model.config.text_config
    assert model.model.vision_model.num_patches == {FLAT: 65, PHOTO: 257}[style]
    assert vision.image_size == scenes.TILE
    assert vision.patch_size == style.patch
    assert vision.max_num_tiles == 4
    assert len(text.cross_attention_layers) >= 3
    assert text.cross_attention_layers[0] != 0
    # 16 MB in bf16.
    assert sum(p.numel() for p in model.parameters()) * 2 <= 16e6


def test_building_is_seeded(processor: MllamaProcessor, model: MllamaForConditionalGeneration, style: Style) -> None:
    again, other = (build_model(processor, seed, style.patch).state_dict() for seed in (0, 1))
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert not again["lm_head.weight"].equal(other["lm_head.weight"])


def test_no_token_of_the_data_is_unknown(processor: MllamaProcessor, style: Style) -> None:
    tokenizer = processor.tokenizer
    texts = {text for split in ("train", "test") for q in easy_vqa.questions(split) for text in (q.text, q.answer)}
    for text in texts | scene_texts(style):
        assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False).input_ids, text
    assert tokenizer.unk_token_id in tokenizer("a zeppelin", add_special_tokens=False).input_ids


def test_answers_survive_the_tokenizer(processor: MllamaProcessor, style: Style) -> None:
    tokenizer = processor.tokenizer
    answers = {q.answer for q in easy_vqa.questions("test")} | {t for t in scene_texts(style) if "?" not in t}
    for answer in answers:
        assert tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids, skip_special_tokens=True) == answer


def test_the_longest_caption_fits_the_demos_token_limit(processor: MllamaProcessor, style: Style) -> None:
    mark = max((mark for marks in style.marks for mark in marks), key=len)
    longest = ", ".join([f"purple triangle {mark}"] * style.most[4])
    assert len(processor.tokenizer(longest, add_special_tokens=False).input_ids) + 1 <= 40


def test_image_token_lies_behind_the_vocabulary_that_can_be_uttered(
    processor: MllamaProcessor, model: MllamaForConditionalGeneration
) -> None:
    assert processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == model.config.text_config.vocab_size
    assert model.config.image_token_index == model.lm_head.out_features


def test_training_and_answering_build_the_same_prompt(processor: MllamaProcessor, style: Style) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what color is the star?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = processor.tokenizer(prompt, add_special_tokens=False).input_ids
    ids, segments, positions, answers = Trainer(processor, 0, "cpu", style).pack([("what color is the star?", "red")])
    told = processor.tokenizer("red<|eot_id|>", add_special_tokens=False).input_ids
    assert ids == asked + told
    assert positions == list(range(len(ids)))
    assert answers == [False] * len(asked) + [True] * len(told)
    assert len(segments) == len(ids)


def test_scenes_fill_one_to_four_tiles(processor: MllamaProcessor, style: Style) -> None:
    found = Counter()
    for index in range(60):
        found[processor.image_processor([[scenes.draw(scenes.scene("test", index, style=style))]])["num_tiles"][0][0]] += 1
    assert set(found) == {1, 2, 3, 4}
    assert min(found.values()) >= 5


def test_a_model_of_smaller_patches_starts_from_what_another_has_learnt() -> None:
    """A patch is seen as the old one saw it enlarged, a position lies between its old neighbours, and words keep their rows."""
    words, processor = build_processor(easy_vqa_texts()), build_processor(easy_vqa_texts(), PHOTO)
    old, new = build_model(words, seed=1), build_model(processor, seed=2, patch=PHOTO.patch)
    fresh = {name: weight.clone() for name, weight in new.state_dict().items()}
    start_from(new, processor, old, words)
    vision, before = new.model.vision_model, old.model.vision_model
    pixels = torch.randn(1, 3, PHOTO.patch, PHOTO.patch)
    enlarged = F.interpolate(pixels, size=(FLAT.patch, FLAT.patch), mode="bilinear")
    torch.testing.assert_close(vision.patch_embedding(pixels), before.patch_embedding(enlarged), atol=1e-5, rtol=1e-4)
    mine, theirs = vision.gated_positional_embedding, before.gated_positional_embedding
    assert mine.embedding[0].equal(theirs.embedding[0])
    torch.testing.assert_close(mine.embedding[1], theirs.embedding[1])
    assert mine.tile_embedding.weight.shape == (9, 4 * 257 * 160)
    place, old_place = (p.tokenizer.convert_tokens_to_ids("▁red") for p in (processor, words))
    assert new.lm_head.weight[place].equal(old.lm_head.weight[old_place])
    unknown = processor.tokenizer.convert_tokens_to_ids("▁p")
    assert new.lm_head.weight[unknown].equal(fresh["lm_head.weight"][unknown])
    layer = "model.language_model.layers.3.cross_attn.q_proj.weight"
    assert new.state_dict()[layer].equal(old.state_dict()[layer])
