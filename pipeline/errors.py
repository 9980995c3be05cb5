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
_NUMBER = re.compile(r"\d[\d.,]*")

Kinds = dict[str, dict[str, Any]]
"""By kind: ``rows``, and the ``ids`` of the first few."""


def kind(error: str) -> str:
    """``error`` without what is this row's alone."""
    return _NUMBER.sub("N", _ADDRESS.sub("", error))


def count(errors: Iterable[tuple[str, str]]) -> Kinds:
    """Of pairs (id, error)."""
    kinds: Kinds = {}
    for id, error in errors:
        _add(kinds, kind(error), 1, [id])
    return kinds


def merge(all_kinds: Iterable[Mapping[str, Mapping[str, Any]]]) -> Kinds:
    """Of several units, the most frequent kind first."""
    merged: Kinds = {}
    for kinds in all_kinds:
        for name, found in kinds.items():
            _add(merged, name, found["rows"], found["ids"])
    return dict(sorted(merged.items(), key=lambda item: -item[1]["rows"]))


def _add(kinds: Kinds, name: str, rows: int, ids: Iterable[str]) -> None:
    if name not in kinds and len(kinds) >= KINDS:
        name = OTHER
    found = kinds.setdefault(name, {"rows": 0, "ids": []})
    found["rows"] += rows
    found["ids"] = [*found["ids"], *ids][:EXAMPLES]
