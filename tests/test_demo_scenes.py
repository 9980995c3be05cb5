"""The drawn scenes: their splits, their questions, their sizes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from demo import scenes
from demo.photographs import NAMES, Crop, photograph
from demo.scenes import FLAT, PHOTO, STYLES, Object, Scene, Style

MANY = 300


def combinations(scene: Scene) -> set[tuple[str, str, str]]:
    return {(o.shape, o.color, o.glyph) for o in scene.objects}


def all_questions(scene: Scene, kind: str) -> dict[str, set[str]]:
    """Every question of a kind that 200 draws ask, with the answers given."""
    found: dict[str, set[str]] = {}
    for seed in range(200):
        asked = scenes.question(scene, kind, random.Random(seed))
        assert asked is not None
        found.setdefault(asked[0], set()).add(asked[1])
    return found


@pytest.fixture(scope="module", params=STYLES)
def style(request: pytest.FixtureRequest) -> Style:
    return STYLES[request.param]


@pytest.fixture(scope="module")
def drawn(style: Style) -> dict[str, list[Scene]]:
    return {split: [scenes.scene(split, i, style=style) for i in range(MANY)] for split in ("train", "test")}


@pytest.fixture
def hand_made() -> Scene:
    """A red star marked A on the left, low; a red circle in the middle, high; a blue cross marked 7 on the right, between."""
    objects = (
        Object("star", "red", "A", 20, 90, 30),
        Object("circle", "red", "", 60, 20, 30),
        Object("cross", "blue", "7", 100, 55, 30),
    )
    return Scene(112, 112, (240, 240, 240), objects, tuple(scenes.COLORS[o.color] for o in objects))


def test_no_training_scene_holds_a_held_out_combination_and_every_test_scene_does(
    drawn: dict[str, list[Scene]], style: Style
) -> None:
    assert not any(scenes.held_out(*c, style) for scene in drawn["train"] for c in combinations(scene))
    assert all(any(scenes.held_out(*c, style) for c in combinations(scene)) for scene in drawn["test"])


def test_no_photograph_lies_behind_scenes_of_both_splits() -> None:
    assert not set(NAMES["train"]) & set(NAMES["test"])
    for split in ("train", "test"):
        behind = [scenes.scene(split, i, style=PHOTO).background for i in range(MANY)]
        found = {crop.name for crop in behind if isinstance(crop, Crop)}
        assert found <= set(NAMES[split])
        assert len(found) > 0.9 * len(NAMES[split])


def test_photographs_of_the_test_split_ride_in_the_environment() -> None:
    for name in NAMES["test"]:
        assert min(photograph(name).size) >= 200
        assert max(photograph(name).size) <= 640


def test_a_photograph_that_is_missing_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("demo.photographs.FOLDER", tmp_path)
    photograph.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"python -m demo\.photographs"):
        scenes.draw(scenes.scene("train", 0, style=PHOTO))


def test_a_crop_is_a_part_of_its_photograph() -> None:
    whole = photograph("skimage/data/astronaut.png")
    full = Crop("skimage/data/astronaut.png", 1.0, 0.0, 0.0, mirrored=False)
    assert ImageChops.difference(full.image(whole.size), whole).getbbox() is None
    corner = Crop("skimage/data/astronaut.png", 0.5, 1.0, 1.0, mirrored=False)
    half = tuple(side // 2 for side in whole.size)
    wanted = whole.crop((whole.width - half[0], whole.height - half[1], *whole.size))
    assert ImageChops.difference(corner.image(half), wanted).getbbox() is None
    mirrored = replace(full, mirrored=True).image(whole.size)
    assert ImageChops.difference(mirrored, whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).getbbox() is None


def test_drills_keep_the_split_and_mark_every_object(style: Style) -> None:
    for index in range(60):
        drill = scenes.scene("train", index, drill=True, style=style)
        assert not any(scenes.held_out(*c, style) for c in combinations(drill))
        assert all(item.glyph for item in drill.objects)
        assert max(drill.width, drill.height) <= scenes.TILE


def test_held_out_combinations_leave_every_shape_color_and_glyph_in_training(style: Style) -> None:
    marks = [mark for alphabet in style.marks for mark in alphabet]
    everything = [(s, c, g) for s in scenes.SHAPES for c in scenes.COLORS for g in marks]
    trained = [c for c in everything if not scenes.held_out(*c, style)]
    assert 0.1 < 1 - len(trained) / len(everything) < 0.2
    assert {c[0] for c in trained} == set(scenes.SHAPES)
    assert {c[1] for c in trained} == set(scenes.COLORS)
    assert {c[2] for c in trained} == set(marks)


def test_a_scene_is_decided_by_style_split_and_index(style: Style) -> None:
    again = scenes.scene("test", 17, style=style)
    assert again == scenes.scene("test", 17, style=style)
    assert again != scenes.scene("test", 18, style=style)
    assert again != scenes.scene("train", 17, style=style)
    assert again != scenes.scene("test", 17, style=PHOTO if style is FLAT else FLAT)
    assert ImageChops.difference(scenes.draw(again), scenes.draw(scenes.scene("test", 17, style=style))).getbbox() is None


def test_scenes_hold_objects_from_left_to_right_without_twins(drawn: dict[str, list[Scene]], style: Style) -> None:
    both = drawn["train"] + drawn["test"]
    assert {len(scene.objects) for scene in both} == set(range(style.fewest, max(style.most.values()) + 1))
    for scene in both:
        assert [o.x for o in scene.objects] == sorted(o.x for o in scene.objects)
        assert len({o.name for o in scene.objects}) == len(scene.objects)
        glyphs = [o.glyph for o in scene.objects if o.glyph]
        assert len(set(glyphs)) == len(glyphs)


def test_every_scene_allows_a_question_of_each_kind(drawn: dict[str, list[Scene]]) -> None:
    for index, scene in enumerate(drawn["test"]):
        for kind in scenes.KINDS:
            assert scenes.question(scene, kind, random.Random(f"test/{index}/{kind}")) is not None


def test_color_shape_and_letter_questions_are_right(hand_made: Scene) -> None:
    assert all_questions(hand_made, "color") == {
        "what color is the star?": {"red"},
        "what color is the circle?": {"red"},
        "what color is the cross?": {"blue"},
        "what color is the object marked a?": {"red"},
        "what color is the object marked 7?": {"blue"},
    }
    # Two objects are red: "the red object" would be ambiguous.
    assert all_questions(hand_made, "shape") == {
        "what shape is the blue object?": {"cross"},
        "what shape is marked a?": {"star"},
        "what shape is marked 7?": {"cross"},
    }
    assert all_questions(hand_made, "letter") == {
        "what is written on the red star?": {"a"},
        "what is written on the blue cross?": {"7"},
        "what is written on the red circle?": {"nothing"},
    }


def test_count_questions_are_right(hand_made: Scene) -> None:
    asked = all_questions(hand_made, "count")
    colors, shapes = {"red": "2", "blue": "1"}, {"star": "1", "circle": "1", "cross": "1"}
    expected = {"how many objects are there?": {"3"}}
    expected |= {f"how many {c} objects are there?": {colors.get(c, "0")} for c in scenes.COLORS}
    expected |= {f"how many {s}{'es' if s == 'cross' else 's'} are there?": {shapes.get(s, "0")} for s in scenes.SHAPES}
    assert asked.items() <= expected.items()
    assert len(asked) > 6


def test_position_questions_are_right(hand_made: Scene) -> None:
    across, down = ("red star", "red circle", "blue cross"), ("red circle", "blue cross", "red star")
    expected = {
        "what is farthest left?": {"red star"},
        "what is farthest right?": {"blue cross"},
        "what is at the top?": {"red circle"},
        "what is at the bottom?": {"red star"},
    }
    for a in across:
        for b in across:
            if a != b:
                expected[f"is the {a} left of the {b}?"] = {"yes" if across.index(a) < across.index(b) else "no"}
                expected[f"is the {a} above the {b}?"] = {"yes" if down.index(a) < down.index(b) else "no"}
    assert all_questions(hand_made, "position") == expected


def test_objects_level_with_each_other_are_not_ordered() -> None:
    objects = (Object("star", "red", "", 20, 50, 30), Object("circle", "blue", "", 80, 50 + scenes.MIN_GAP - 1, 30))
    level = Scene(112, 112, (240, 240, 240), objects, ((200, 0, 0), (0, 0, 200)))
    assert not any("top" in q or "bottom" in q or "above" in q for q in all_questions(level, "position"))


def test_caption_lists_the_objects_from_left_to_right(hand_made: Scene) -> None:
    assert all_questions(hand_made, "caption") == {scenes.CAPTION_PROMPT: {"red star a, red circle, blue cross 7"}}


def test_owners_name_the_object_that_is_drawn(hand_made: Scene) -> None:
    picture, owners = scenes.draw(hand_made), scenes.owners(hand_made)
    assert picture.size == owners.size
    for index, item in enumerate(hand_made.objects):
        if not item.glyph:
            assert picture.getpixel((round(item.x), round(item.y))) == hand_made.tints[index]
        assert owners.getpixel((round(item.x), round(item.y))) == index + 1
    assert owners.getpixel((1, 1)) == 0
    assert picture.getpixel((1, 1)) == hand_made.background
