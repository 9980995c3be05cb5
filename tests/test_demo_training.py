"""The training script on a handful of steps: it learns from training data alone, and continues as if never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo import scenes, train
from demo.architecture import build_processor
from demo.scenes import FLAT, PHOTO, Style
from demo.train import Sampler, Trainer, easy_pictures, easy_vqa_texts, scene_picture, to_tiles

EASY_PICTURES = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal runs are equal to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the splits that anything is drawn or read from."""
    asked: set[str] = set()
    draw, read = train.scenes.scene, train.easy_vqa.questions

    def scene(split: str, *arguments: Any) -> scenes.Scene:
        asked.add(f"scenes/{split}")
        return draw(split, *arguments)

    def questions(split: str) -> list[train.easy_vqa.Question]:
        asked.add(f"easy-vqa/{split}")
        return read(split)

    monkeypatch.setattr(train.scenes, "scene", scene)
    monkeypatch.setattr(train.easy_vqa, "questions", questions)
    return asked


@pytest.fixture
def few_easy_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = train.easy_vqa.questions

    def few(split: str) -> list[train.easy_vqa.Question]:
        return [item for item in everything(split) if item.image < EASY_PICTURES]

    # The tokenizer is built from the whole train split: only the pictures are fewer.
    monkeypatch.setattr(train, "easy_vqa_texts", lambda: [t for q in everything("train") for t in (q.text, q.answer)])
    monkeypatch.setattr(train.easy_vqa, "questions", few)


def run(monkeypatch: pytest.MonkeyPatch, work: Path, output: Path, *steps: int) -> dict[str, torch.Tensor]:
    options = [f"--{name}-steps={n}" for name, n in zip(("tower", "language", "exact"), steps, strict=True)]
    arguments = ["train", f"--work={work}", f"--output={output}", "--scenes=300", "--drills=60", "--device=cpu", *options]
    monkeypatch.setattr("sys.argv", arguments)
    train.main()
    return load_file(output / "model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("few_easy_pictures")
def test_an_interrupted_training_gives_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(monkeypatch, tmp_path / "whole", tmp_path / "a", 2, 2, 2)
    # The first three steps of the same schedule, whose end writes a checkpoint; then the rest from there.
    early = run(monkeypatch, tmp_path / "parts", tmp_path / "early", 2, 1, 0)
    capsys.readouterr()
    resumed = run(monkeypatch, tmp_path / "parts", tmp_path / "b", 2, 2, 2)
    said = capsys.readouterr().out
    assert "continuing at step 3" in said
    assert set(json.loads(said.splitlines()[-1])["validation"]) >= {"what color", "list the"}
    assert whole.keys() == resumed.keys()
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())
    assert not all(resumed[name].equal(tensor) for name, tensor in early.items())
    assert splits == {"scenes/train", "easy-vqa/train"}, "nothing of a test split enters training"


@pytest.mark.usefixtures("few_easy_pictures")
def test_batches_follow_from_the_seed_and_the_step_alone() -> None:
    processor = build_processor(train.easy_vqa_texts())
    pictures = [scene_picture(processor, "train", i, seed=0) for i in range(300)]
    drills = [scene_picture(processor, "train", i, seed=0, drill=True) for i in range(60)]
    easy = easy_pictures(processor, "train")

    def texts(sampler: Sampler, step: int) -> list[list[tuple[str, str]]]:
        return [p.texts for batch in sampler.micro_batches(step, "language", step) for p in batch]

    batch = train.BATCH[FLAT]
    first, second = (Sampler(pictures, drills, easy, 0, batch) for _ in range(2))
    texts(first, 1)
    assert texts(first, 7) == texts(second, 7)
    assert texts(first, 7) != texts(first, 8)
    assert texts(first, 7) != texts(Sampler(pictures, drills, easy, 1, batch), 7)
    for micro in first.micro_batches(7, "language", 7):
        assert len({len(picture.tiles) for picture in micro}) == 1
        assert all(p.texts[-1][0] == scenes.CAPTION_PROMPT for p in micro if p.labels is not None)


@pytest.mark.parametrize(("style", "index"), [(FLAT, 3), (PHOTO, 1), (PHOTO, 4)], ids=lambda given: getattr(given, "name", ""))
def test_patch_labels_tell_what_the_drawing_knows(style: Style, index: int) -> None:
    """Of the test split, whose photographs are there."""
    processor = build_processor(easy_vqa_texts(), style)
    picture, scene = scene_picture(processor, "test", index, 0, style), scenes.scene("test", index, style=style)
    assert picture.labels is not None
    names = list(train.label_classes(style))
    assert picture.labels.shape == (len(picture.tiles) * (scenes.TILE // style.patch) ** 2, len(names))
    found = {tuple(row) for row in picture.labels.tolist() if row[0] > 0}
    ranks = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].y)
    first = list(dict.fromkeys(mark[0] for marks in style.marks for mark in marks))
    wanted = set()
    for number, o in enumerate(scene.objects):
        glyph = [1 + first.index(o.glyph[0]) if o.glyph else 0]
        glyph += [1 + int(o.glyph[1]) if len(o.glyph) > 1 else 0] if style is PHOTO else []
        named = (1 + scenes.SHAPES.index(o.shape), 1 + list(scenes.COLORS).index(o.color), *glyph)
        wanted.add((*named, 1 + number, 1 + ranks.index(number)))
    assert found == wanted
    assert all(max(row[column] for row in wanted) < train.label_classes(style)[name] for column, name in enumerate(names))


def test_easy_vqa_pictures_are_grouped_with_their_questions() -> None:
    processor = build_processor(easy_vqa_texts())
    pictures = easy_pictures(processor, "test")
    assert len(pictures) == 1_000
    assert sum(len(p.texts) for p in pictures) == 9_673
    assert all(len(p.tiles) == 1 and p.labels is None for p in pictures)


@pytest.mark.parametrize("style", [FLAT, PHOTO], ids=lambda style: style.name)
def test_the_tower_learns_what_transformers_will_compute(style: Style) -> None:
    """Features of the last stage are those of the masked tower, of four tiles already before it, and all weights get a
    gradient."""
    processor = build_processor(easy_vqa_texts(), style)
    trainer = Trainer(processor, 0, "cpu", style)
    core = trainer.model.model
    for count, exact in ((2, True), (4, True), (4, False)):
        image = next(i for i in map(partial(drawn, style), range(100)) if len(to_tiles(processor, i)[0]) == count)
        tiles, ratio = to_tiles(processor, image)
        features = trainer.encode([train.Picture(tiles, ratio, [])], exact=exact)
        features.square().mean().backward()
        inputs = processor(images=[[image]], text="<|image|>", return_tensors="pt")
        with torch.no_grad():
            vision = core.vision_model(*(inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")))
            expected = core.multi_modal_projector(vision.last_hidden_state[0, 0, :count]).flatten(0, 1)
        torch.testing.assert_close(features[0], expected, atol=2e-4, rtol=1e-4)
    without = [name for name, weight in core.vision_model.named_parameters() if weight.grad is None]
    assert not without


def drawn(style: Style, index: int) -> Image.Image:
    """On paper: training's photographs need not be there."""
    return scenes.draw(replace(scenes.scene("test", index, style=style), background=(240, 240, 240)))
