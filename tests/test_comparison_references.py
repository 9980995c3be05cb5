"""Scores against references, on cases worked out by hand."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from jobs.comparison.references import accuracy, anls, truths, vqa_accuracy, vqa_words


def test_references_come_in_several_forms() -> None:
    assert truths("x") == ["x"]
    assert truths(3) == ["3"]
    assert truths(None) == truths([]) == truths([None]) == []
    assert truths(["a", None, "b"]) == ["a", "b"]
    assert truths([{"answer": "a", "answer_confidence": "yes"}, {"answer": "b"}]) == ["a", "b"]


def test_accuracy_is_the_pipelines() -> None:
    assert accuracy("Red.", "red") == 1.0
    assert accuracy("two", ["one", "Two"]) == 1.0
    assert accuracy("two", "three") == accuracy(None, "x") == 0.0
    assert accuracy("two", None) is None
    assert accuracy("7", 7) == 1.0


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(agree: int, score: float) -> None:
    # With 2 who agree: 2 sets of nine leave one of them out (1/3), 8 do not (2/3): (2/3 + 16/3) / 10 = 0.6.
    assert vqa_accuracy("red", ["red"] * agree + ["blue"] * (10 - agree)) == pytest.approx(score)


@pytest.mark.parametrize("people", [2, 3, 5, 10])
def test_vqa_accuracy_is_the_mean_over_sets_that_leave_one_out(people: int) -> None:
    for agree in range(people + 1):
        answers = ["a b"] * agree + ["c"] * (people - agree)
        sets = list(combinations(answers, people - 1))
        mean = sum(min(one.count("a b") / 3, 1) for one in sets) / len(sets)
        # "a" is an article, which must fall on both sides.
        assert vqa_accuracy("b", answers) == pytest.approx(mean)


def test_consensus_needs_several_references() -> None:
    assert vqa_accuracy("red", "red") is None
    assert vqa_accuracy("red", ["red"]) is None
    assert vqa_accuracy("red", ["red", None]) is None
    assert vqa_accuracy(None, ["red"] * 10) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Red Square.", "red square"),
        ("a man's hat", "man's hat"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("don’t know", "don't know"),
        ("its tail", "its tail"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("10:30 a.m.", "10:30 am"),
        ("black/white, or-grey!", "black white or grey"),
        ("snake_case", "snake case"),
        (" \n ", ""),
        ("An an THE", ""),
    ],
)
def test_words_as_vqa_compares_them(text: str, words: str) -> None:
    assert vqa_words(text) == words


@pytest.mark.parametrize(
    ("text", "cell", "score"),
    [
        ("hello", "Hello ", 1.0),
        # One of five characters.
        ("hallo", "hello", 0.8),
        # Two of four: at the threshold nothing counts.
        ("abxy", "abcd", 0.0),
        ("abcx", "abcd", 0.75),
        ("co cacola", "coca cola", 1 - 2 / 9),
        ("cat", ["dog", "car", "cart"], 0.75),
        ("", "cat", 0.0),
        (None, "cat", 0.0),
    ],
)
def test_anls(text: str | None, cell: Any, score: float) -> None:
    assert anls(text, cell) == pytest.approx(score)


def test_no_reference_is_no_score() -> None:
    assert anls("x", None) is vqa_accuracy("x", None) is accuracy("x", []) is None
