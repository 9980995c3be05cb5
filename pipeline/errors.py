"""Rows' errors, counted by kind: texts that differ in names and numbers alone are one kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

EXAMPLES = 3
KINDS = 50
"""Kinds that are told apart, at most; the rest are counted as ``OTHER``."""
OTHER = "other errors"

# An image's address stands in front of what is wrong with it: it has a dot or a slash and no space.
_ADDRESS = re.compile(r"^\S*[./]\S*: ")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

Kinds = dict[str, dict[str, Any]]
"""By kind: ``rows``, the ``ids`` of the first few, and the first one's own words as ``example``."""


def one_line(error: BaseException) -> str:
    """What ``error`` says, in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def kind(error: str) -> str:
    """``error`` without what is this row's alone."""
    return _NUMBER.sub("N", _ADDRESS.sub("", error))


def count(errors: Iterable[tuple[str, str]]) -> Kinds:
    """Of pairs (id, error)."""
    kinds: Kinds = {}
    for id, error in errors:
        _add(kinds, kind(error), {"rows": 1, "ids": [id], "example": error})
    return kinds


def merge(all_kinds: Iterable[Mapping[str, Mapping[str, Any]]]) -> Kinds:
    """Of several units, the most frequent kind first."""
    merged: Kinds = {}
    for kinds in all_kinds:
        for name, found in kinds.items():
            _add(merged, name, found)
    return dict(sorted(merged.items(), key=lambda item: -item[1]["rows"]))


def example(name: str, found: Mapping[str, Any]) -> str:
    """The kind in the words of its first row, numbers and names included. (Runs of earlier versions have noted none.)"""
    return str(found.get("example", name))


def _add(kinds: Kinds, name: str, more: Mapping[str, Any]) -> None:
    if name not in kinds and len(kinds) >= KINDS:
        name = OTHER
    found = kinds.setdefault(name, {"rows": 0, "ids": [], "example": example(name, more) if name != OTHER else OTHER})
    found["rows"] += more["rows"]
    found["ids"] = [*found["ids"], *more["ids"]][:EXAMPLES]
