"""Answers against references, one row at a time: accuracy, VQA accuracy and ANLS."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pipeline import metrics

ANLS_THRESHOLD = 0.5
CONSENSUS = 3
"""People who must have given an answer for it to be right in full."""

_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
# Often written without their apostrophe. Those that are words of their own then (its, well, were, ill, shell) are left out.
_WITH_APOSTROPHE = """
    ain't aren't can't couldn't could've didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm i've isn't it'd
    it'll let's ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't shouldn't should've somebody's someone's
    something's that'd that's there'd there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'll who's who've why're why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
# A full stop that is no decimal point.
_PERIOD = re.compile(r"(?<!\d)\.|\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
# Neither the apostrophe of a contraction or possessive, nor the colon of a time of day, nor the decimal point left above.
_PUNCTUATION = re.compile(r"[^\w\s'’:.]|_")


def truths(cell: Any) -> list[str]:
    """A reference cell's texts: one value, a list of values, or a list of structs with an ``answer``, as VQA v2 has them."""
    cells = cell if isinstance(cell, list) else [cell]
    plain = [one.get("answer") if isinstance(one, Mapping) else one for one in cells]
    return [str(one) for one in plain if one is not None]


def accuracy(text: str | None, cell: Any) -> float | None:
    """Whether ``text`` is a reference, case and punctuation aside: the pipeline's own accuracy. None without a reference."""
    there = truths(cell)
    return float(metrics.exact(text, there)) if there else None


def vqa_accuracy(text: str | None, cell: Any) -> float | None:
    """Consensus of several people's answers; None where the references are no list of at least two.

    min(people who gave this answer / 3, 1), averaged over all sets that leave one of the people out (Antol et al., VQA: Visual
    Question Answering, ICCV 2015, section 3.1 "Answers", and the evaluation of VQA v2, Goyal et al. 2017), after ``vqa_words``
    on both sides. The official code leaves the words as they are where all people agree; here they are always treated alike.
    """
    there = truths(cell)
    if not isinstance(cell, list) or len(there) < 2:
        return None
    if text is None:
        return 0.0
    people = Counter(map(vqa_words, there))
    agree, n = people[vqa_words(text)], len(there)
    # Leaving out one of those who agree, `agree` times, or one of the others.
    with_one_less = agree * min((agree - 1) / CONSENSUS, 1.0) if agree else 0.0
    return (with_one_less + (n - agree) * min(agree / CONSENSUS, 1.0)) / n


@lru_cache(65_536)
def vqa_words(text: str) -> str:
    """``text`` as VQA's evaluation compares it: in lower case, without full stops, articles and punctuation, numbers up to ten
    as digits, contractions with their apostrophe (https://visualqa.org/evaluation.html)."""
    said = _COMMA.sub("", _PERIOD.sub("", " ".join(text.lower().split()).replace("’", "'")))
    words = (word for word in _PUNCTUATION.sub(" ", said).split() if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, _NUMBERS.get(word, word)) for word in words)


def anls(text: str | None, cell: Any) -> float | None:
    """Similarity to the nearest reference; its mean over rows is ANLS. None without a reference.

    1 − Levenshtein distance / the longer one's length, in characters, and 0 where that distance is half the length or more
    (Biten et al., Scene Text Visual Question Answering, ICCV 2019, section 4, τ = 0.5); case does not matter, spaces inside do.
    """
    there = truths(cell)
    if not there:
        return None
    if text is None:
        return 0.0
    return max(_similar(text.strip().lower(), truth.strip().lower()) for truth in there)


def _similar(text: str, truth: str) -> float:
    from rapidfuzz.distance import Levenshtein

    distance = Levenshtein.normalized_distance(text, truth)
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


SCORES: dict[str, Callable[[str | None, Any], float | None]] = {
    "accuracy": accuracy,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
}
"""By name; each takes an answer's text, None for a row with an error, and its reference cell."""
