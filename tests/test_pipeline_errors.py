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
        "no such file": {"rows": 2, "ids": ["0", "1"], "example": "a/b.jpg: no such file"},
        "N x N is over N:N": {"rows": 2, "ids": ["2", "3"], "example": "20000 x 20 is over 100:1"},
        "RuntimeError: boom": {"rows": 1, "ids": ["4"], "example": "RuntimeError: boom"},
    }


def test_numbers_leave_the_words_around_them() -> None:
    assert errors.kind("it needs 1,234.5 MiB. shard-00007.parquet has 12.") == "it needs N MiB. shard-N.parquet has N."


def test_a_kind_is_shown_in_one_rows_words() -> None:
    merged = errors.merge([errors.count([("a", "needs 12 MiB of 3"), ("b", "needs 99 MiB of 3")])])
    ((name, found),) = merged.items()
    assert name == "needs N MiB of N"
    assert errors.example(name, found) == "needs 12 MiB of 3"
    # What an earlier version has written.
    assert errors.example(name, {"rows": 2, "ids": ["a", "b"]}) == name
    many = errors.count((str(i), "kind " + "x" * i) for i in range(errors.KINDS + 2))
    assert errors.example(errors.OTHER, many[errors.OTHER]) == errors.OTHER


def test_units_add_up_with_three_ids_and_the_most_frequent_first() -> None:
    units = [errors.count([(f"{u}/{i}", "often") for i in range(2)] + [(f"{u}/x", f"kind {'x' * u}")]) for u in range(100)]
    merged = errors.merge(units)
    assert next(iter(merged)) == "often"
    assert merged["often"] == {"rows": 200, "ids": ["0/0", "0/1", "1/0"], "example": "often"}
    assert len(merged) == errors.KINDS + 1
    assert sum(found["rows"] for found in merged.values()) == 300
