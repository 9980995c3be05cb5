"""How far one run's text is the other's."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

# A word, or one mark. Han and kana have no spaces between words: each sign is a token there.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks. Not the model's tokens: two runs' models may differ, and words are what a reader sees."""
    return _TOKEN.findall(text)


def exact(text: str, other: str) -> bool:
    """Whether the texts are equal, as written."""
    return text == other


@lru_cache(65_536)
def edit_similarity(text: str, other: str) -> float:
    """1 − Levenshtein distance of the ``tokens`` / the longer one's number of tokens; 1 for equal texts."""
    if text == other:
        return 1.0
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(tokens(text), tokens(other))


@lru_cache(65_536)
def chrf(text: str, other: str) -> float:
    """Sentence chrF of ``text`` with ``other`` as its reference, in [0, 1]; 1 for equal texts.

    F-score of character n-grams up to 6, recall weighing twice as much as precision (Popović, chrF: character n-gram F-score
    for automatic MT evaluation, WMT 2015), by sacrebleu with its defaults.
    """
    if text == other:
        return 1.0
    return float(_metric().sentence_score(text, [other]).score) / 100


@cache
def _metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
