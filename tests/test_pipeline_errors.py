"""Errors by kind."""

from __future__ import annotations

from pipeline import errors


def test_names_and_numbers_are_no_kind() -> None:
    said = [
        "a/b.jpg: no such file",
        "c.png: no such file",
        "20000 x 20 is over 100:1",
        "1 x 201 is over 100:1",
        "RuntimeError: boom",
    ]
    counted = errors.count((str(i), text) for i, text in enumerate(said))
    assert counted == {
        "no such file": {"rows": 2, "ids": ["0", "1"]},
        "N x N is over N:N": {"rows": 2, "ids": ["2", "3"]},
        "RuntimeError: boom": {"rows": 1, "ids": ["4"]},
    }


def test_units_add_up_with_three_ids_and_the_most_frequent_first() -> None:
    units = [errors.count([(f"{u}/{i}", "often") for i in range(2)] + [(f"{u}/x", f"kind {'x' * u}")]) for u in range(100)]
    merged = errors.merge(units)
    assert next(iter(merged)) == "often"
    assert merged["often"] == {"rows": 200, "ids": ["0/0", "0/1", "1/0"]}
    assert len(merged) == errors.KINDS + 1
    assert sum(found["rows"] for found in merged.values()) == 300
