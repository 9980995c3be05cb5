"""Agreement of two texts, on cases worked out by hand."""

from __future__ import annotations

import pytest
from sacrebleu import sentence_chrf

from jobs.comparison.agreement import chrf, edit_similarity, exact, tokens


def test_tokens_are_words_and_marks() -> None:
    assert tokens("It's a red-brick house, No. 7.") == [
        "It",
        "'",
        "s",
        "a",
        "red",
        "-",
        "brick",
        "house",
        ",",
        "No",
        ".",
        "7",
        ".",
    ]
    assert tokens("  naïve\n café ") == ["naïve", "café"]
    # No spaces between words: each sign counts, or one wrong sign would be a whole wrong sentence.
    assert tokens("赤い車 red") == ["赤", "い", "車", "red"]
    assert tokens(" ") == []


@pytest.mark.parametrize(
    ("text", "other", "similarity"),
    [
        ("a red square", "a red square", 1.0),
        ("a red square", "a blue square", 2 / 3),
        ("a square", "a red square", 2 / 3),
        ("a red square.", "a red square", 3 / 4),
        ("a  red square", "a red square", 1.0),
        ("", "two words", 0.0),
        ("", "  ", 1.0),
        ("one two", "three four five", 0.0),
    ],
)
def test_edit_similarity(text: str, other: str, similarity: float) -> None:
    assert edit_similarity(text, other) == pytest.approx(similarity)
    assert edit_similarity(other, text) == pytest.approx(similarity)


def test_texts_agree_as_they_are_written() -> None:
    assert exact("Yes", "Yes")
    assert not exact("Yes", "yes")
    assert not exact("Yes", "Yes.")


def test_chrf_is_sacrebleus_as_a_fraction() -> None:
    # By hand, n-grams up to the shorter text's: precision 3/4, 2/3, 1/2, 0 and recall 3/3, 2/2, 1/1 (n = 1 to 3).
    assert chrf("abcd", "abc") == pytest.approx(sentence_chrf("abcd", ["abc"]).score / 100)
    precision, recall = (3 / 4 + 2 / 3 + 1 / 2) / 3, 1.0
    assert chrf("abcd", "abc") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf("", "") == chrf("a cat", "a cat") == 1.0
    assert chrf("xyz", "abc") == chrf("", "abc") == 0.0
    # Recall of the reference counts more: leaving out is worse than adding.
    assert chrf("a red square on", "a red square on a table") < chrf("a red square on a table", "a red square on")
