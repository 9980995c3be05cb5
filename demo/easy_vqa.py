"""easy-VQA (Victor Zhou, MIT licence), read from its PyPI package ``easy-vqa``: one shape an image, 13 answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Question:
    """``image`` is the number of the picture in its split; ``path`` its PNG file."""

    text: str
    answer: str
    image: int
    path: Path


def questions(split: str) -> list[Question]:
    """All questions of ``split`` ("train": 38,575 on 4,000 images; "test": 9,673 on 1,000 images)."""
    import easy_vqa

    texts, answers, images = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]()
    paths = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()
    return [Question(t, a, i, Path(paths[i])) for t, a, i in zip(texts, answers, images, strict=True)]


def kind(question: str) -> str:
    """The kind of a question: what is asked for, ``shape`` or ``color``, or ``presence`` (a yes or no)."""
    if not question.startswith("what"):
        return "presence"
    return "color" if "color" in question else "shape"
