"""Numbers as a reader wants them: few digits, with a unit, an interval or a verdict; a dash for what is not known."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from jobs.report import size

UNKNOWN = "–"
_NEVER = frozenset("\ufffe\uffff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
METRICS = {
    "accuracy": "accuracy",
    "vqa_accuracy": "VQA accuracy",
    "anls": "ANLS",
    "exact": "exact agreement",
    "edit_similarity": "edit similarity",
    "chrf": "chrF",
}
"""What a reader knows a score by."""


def printable(text: str) -> str:
    """``text`` without control characters, which no browser shows and no XML holds, and without the signs that turn around what
    comes after them."""
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _NEVER))


def known(value: float | None, shape: Callable[[float], str]) -> str:
    """``shape(value)``, or a dash."""
    return UNKNOWN if value is None else shape(value)


def number(value: float) -> str:
    """Three significant digits, or all digits before the point, with thousands parted: ``0.0123``, ``12.3``, ``12,345``."""
    if value == 0 or abs(value) >= 99.95:
        return minus(f"{value:,.0f}")
    if abs(value) >= 9.995:
        return minus(f"{value:.1f}")
    if abs(value) >= 0.9995:
        return minus(f"{value:.2f}")
    return minus(f"{value:.3g}")


def whole(value: float) -> str:
    return minus(f"{value:,.0f}")


def hundredths(value: float) -> str:
    return minus(f"{value:,.2f}")


def about(value: float) -> str:
    """Two significant digits: what is an estimate does not look like a count."""
    return f"{float(f'{value:.2g}'):,.0f}"


def dollars(value: float) -> str:
    """Cents below a hundred dollars, more digits below ten cents."""
    if value == 0 or abs(value) >= 0.1:
        return f"${value:,.2f}" if abs(value) < 100 else f"${value:,.0f}"
    return f"${value:.2g}"


def share(value: float) -> str:
    """A fraction of 1 as ``97.1%``."""
    return f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}×" if 0.095 <= value < 9.995 else f"{number(value)}×"


def bytes_of(value: float) -> str:
    return minus(size(value))


def byte_seconds(value: float) -> str:
    return f"{bytes_of(value)}·s"


def minus(text: str) -> str:
    """With a minus sign that is as wide as a plus."""
    return text.replace("-", "−")


def score(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """``found``, or None where it holds no value: no rows, no references."""
    return found if found is not None and found.get("value") is not None else None


def interval(found: dict[str, Any] | None, shape: Callable[[float], str]) -> str:
    """``low – high``; nothing where it is not known."""
    if found is None or found.get("low") is None or found.get("high") is None:
        return ""
    return f"{shape(found['low'])} to {shape(found['high'])}"


def points(value: float) -> str:
    """A difference of two fractions, in percentage points: ``−0.3``."""
    return minus(f"{100 * value:+.1f}")


def signed(shape: Callable[[float], str]) -> Callable[[float], str]:
    """``shape`` with a plus before what is positive."""
    return lambda value: ("+" if value > 0 else "") + shape(value)


def verdict(difference: dict[str, Any]) -> str:
    """The verdict with, where rows are too few, how many of them would tell."""
    said = str(difference["verdict"])
    if said != "not distinguishable":
        return said
    rows = difference.get("rows_that_would_tell")
    tells = f"about {about(rows)} rows would tell" if rows else "no difference was seen"
    return f"not distinguishable in {difference['rows']:,} rows; {tells}"


def tone(difference: dict[str, Any] | None) -> str:
    """``good``, ``bad`` or nothing: how a page colours the verdict."""
    return {"better": "good", "worse": "bad"}.get(difference["verdict"], "") if difference else ""
