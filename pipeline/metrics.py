"""Accuracy against a column of true answers."""

from __future__ import annotations

import re
import unicodedata

_NOT_WORD = re.compile(r"[^\w]+")


def normalised(text: str) -> str:
    """``text`` without case, punctuation and runs of spaces."""
    return _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def exact(text: str | None, truth: object) -> bool:
    """Whether ``text`` is the true answer, or one of several where ``truth`` is a list, both normalised."""
    if text is None:
        return False
    truths = truth if isinstance(truth, list) else [truth]
    return normalised(text) in {normalised(str(t)) for t in truths if t is not None}
