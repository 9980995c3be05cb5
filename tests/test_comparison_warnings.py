"""Each reason why two runs do not quite compare is said, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from jobs.comparison.runs import Run, read_run
from jobs.comparison.warnings import warnings
from pipeline.storage import Storage

ROWS = [{"id": str(i), "text": "x"} for i in range(10)]


def made(folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Run:
    write_run(folder, ROWS if rows is None else rows, **settings)
    return read_run(Storage(str(folder)), folder.name)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "input": ({"input_digest": "f" * 16, "config": {"input": "there"}}, "The inputs differ: there in run, in in base"),
    "changed input": ({"input_digest": "f" * 16}, "The inputs differ: shards of in have changed between base and run"),
    "prompt": (
        {"config": {"job": "caption", "prompt": "Say it.", "question_column": "question"}},
        "The prompts differ: Say it. in run, none in base.",
    ),
    "question": ({"config": {"question_column": "asked"}}, "The question columns differ: asked in run, question in base."),
    "tokens": ({"config": {"max_new_tokens": 7}}, "The most new tokens (max_new_tokens) differ: 7 in run, 64 in base."),
    "stop": ({"config": {"stop": ["\n"]}}, "The stop texts differ: ['\\n'] in run, [] in base."),
    "model": ({"identity": "other"}, "The models differ: tiny (other) in run, tiny (tiny-checkpoint) in base."),
    "dtype": ({"dtype": "bfloat16"}, "The weights' types differ: bfloat16 in run, float32 in base."),
    "hardware": ({"device": "NVIDIA H200"}, "The hardware differs: NVIDIA H200 in run, CPU, 2 threads in base;"),
    "semantics": ({"config": {"rows": "transformers"}}, "The row semantics (rows) differ: transformers in run, meta in base."),
    "limit": ({"config": {"limit": 9}}, "The limits differ: 9 in run, none in base."),
    "tower": ({"config": {"tower_tiles": "real"}}, "The tower_tiles differ: real in run, pooled in base."),
    "torch": ({"run": {"versions": {"torch": "1.0"}}}, "The versions of torch differ: 1.0 in run,"),
    "unfinished": ({"unfinished": 1}, "run is incomplete: 2 of 3 units (8 rows) are finished"),
    "partition": ({"partition": (1, 2)}, "run is incomplete: 1 of its 2 partitions have begun."),
    "uncounted": (
        {"stats": dict.fromkeys(("cross_kv_byte_seconds", "cross_kv_bytes_read"))},
        "run was made by an older version that did not count what was held and read",
    ),
    "older": ({"stats": {"actor_seconds": None, "gpus": None}}, "did not time its actors (3 of 3 units)"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_said(case: str, tmp_path: Path) -> None:
    settings, said = CASES[case]
    found = warnings(made(tmp_path / "run", **settings), made(tmp_path / "base"), joined=10)
    assert any(said in one for one in found), found
    # A caption is another job too, another torch has lost its transformers, whose rows want all of the padding.
    assert len(found) == (2 if case in ("prompt", "torch", "semantics") else 1)
    assert all(one.endswith(".") and "\n" not in one for one in found)


def test_what_is_compared_is_no_reason(tmp_path: Path) -> None:
    base = made(tmp_path / "base", config={"seed": 1})
    for place, config in enumerate(
        ({"policy": "trimmed-llama"}, {"max_tiles": 1}, {"unit_rows": 4, "write_kept": True, "seed": 2})
    ):
        assert warnings(made(tmp_path / str(place), config=config), base, joined=10) == []


def test_a_trimmed_run_that_holds_more(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    trimmed = {"config": {"policy": "grid"}}

    def found(name: str, config: dict[str, Any] | None = None, against: Run = base, **stats: Any) -> list[str]:
        settings = {"config": config} if config else trimmed
        return warnings(made(tmp_path / name, **settings, stats=stats), against, joined=10)

    peak = "at its peak beside 2.0 KiB (2.00×)."
    (said,) = found("peak", peak_cross_kv_bytes=4000)
    assert said == f"peak trims and holds more cross KV than base: 3.9 KiB {peak}"
    # For longer, but within what all features would have held meanwhile: two runs' seconds differ.
    assert found("longer", cross_kv_byte_seconds=40_000.0, cross_kv_byte_seconds_full=80_000.0) == []
    # As much, the rounding of what is allocated aside; or more, of more rows at once: what trimming makes room for.
    assert found("same", peak_cross_kv_bytes=2020) == []
    assert found("rows", peak_cross_kv_bytes=4000, peak_sequences=9) == []
    # More than a baseline that is smaller to begin with, or than another run with all features.
    tiles = made(tmp_path / "tiles", config={"max_tiles": 1})
    assert found("beside", against=tiles, peak_cross_kv_bytes=4000) == []
    assert found("full", {"policy": "none"}, peak_cross_kv_bytes=4000) == []


def test_sampling_and_its_seed(tmp_path: Path) -> None:
    base = made(tmp_path / "base", config={"temperature": 1.0, "seed": 1})
    run = made(tmp_path / "run", config={"temperature": 1.0, "seed": 2})
    assert warnings(run, base, joined=10) == ["The seeds of sampling differ: 2 in run, 1 in base."]
    (said,) = warnings(made(tmp_path / "greedy", config={"seed": 1}), base, joined=10)
    assert said == "The temperatures differ: 0.0 in greedy, 1.0 in base."


def test_ids_that_do_not_meet(tmp_path: Path) -> None:
    run, base = made(tmp_path / "run"), made(tmp_path / "base", [*ROWS, *({"id": f"more {i}", "text": "x"} for i in range(10))])
    assert warnings(run, base, joined=10) == ["Few rows have an id that is in both runs: 10 of 20 rows of base."]
    assert warnings(run, base, joined=0) == ["No row of one run has the id of a row of the other, so no answers are compared."]


def test_a_baselines_own_reasons_are_said_too(tmp_path: Path) -> None:
    found = warnings(made(tmp_path / "run"), made(tmp_path / "base", unfinished=1), joined=8)
    assert len(found) == 2
    assert found[0] == "Few rows have an id that is in both runs: 8 of 10 rows of run."
    assert found[1].startswith("base is incomplete")
