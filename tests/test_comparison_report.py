"""The dict that the report is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_folders import TOKEN_BYTES, TOKENS_PER_TILE, digest, write_run

from jobs.comparison import joins, report, runs
from jobs.comparison.runs import read_runs

Rows = list[dict[str, Any]]


def rows(texts: Sequence[str | None], answers: list[Any] | None = None, per_image: int = 2, **more: Any) -> Rows:
    """Rows "0", "1" … whose text of None is an error; ``per_image`` of them ask about one image."""
    found: Rows = []
    for i, text in enumerate(texts):
        said = {"error": "broken"} if text is None else {"text": text}
        found.append({"id": str(i), "image_digest": digest(f"image {i // per_image}"), "question": "q", **said, **more})
        if answers is not None:
            found[-1]["answer"] = answers[i]
    return found


def build(base: Path, *names: str, prices: dict[str, float] | None = None, **options: Any) -> dict[str, Any]:
    """The report on the folders of these names, the first as the baseline."""
    asked = [f"{name}={base / name}" for name in names]
    made = report.build(read_runs(asked, names[0], {}), prices or {}, **options)
    # What JSON can't say must not be in it.
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    return made


def test_numbers_of_a_comparison(tmp_path: Path) -> None:
    answers = ["red cat"] * 8
    write_run(tmp_path / "base", rows(["red cat"] * 4 + ["blue cat"] * 2 + [None, "red cat"], answers))
    mine = rows(["red cat"] * 3 + ["red dog"] + ["red cat"] * 2 + ["red cat", None], answers, keep_fraction=0.5)
    write_run(tmp_path / "mine", [*mine, {"id": "more", "text": "x"}], config={"policy": "grid"}, stats={"actor_seconds": 4.0})
    made = build(tmp_path, "base", "mine", prices={"cpu": 0.1})
    assert made["baseline"] == "base"
    assert made["prices"] == {"cpu": 0.1}
    base, mine_run = made["runs"]
    assert (base["name"], base["policy"], base["rows"], base["errors"]) == ("base", "none", 8, 1)
    assert base["error_kinds"] == {"broken": {"rows": 1, "ids": ["6"], "example": "broken"}}
    # Errors are wrong answers: 5 of 8, of four images; rows without a reference are not judged.
    assert base["scores"]["accuracy"] | {"low": 0, "high": 0} == {"value": 5 / 8, "low": 0, "high": 0, "rows": 8, "clusters": 4}
    assert mine_run["scores"]["accuracy"]["value"] == 6 / 8
    assert base["scores"]["vqa_accuracy"] is None

    (found,) = made["comparisons"]
    assert found["run"] == "mine"
    counts = ("joined", "only_in_run", "only_in_baseline", "errors_in_run_only", "errors_in_baseline_only", "compared")
    assert [found[name] for name in counts] == [8, 1, 0, 1, 1, 6]
    agreement = found["agreement"]
    assert (agreement["exact"]["value"], agreement["exact"]["rows"], agreement["exact"]["clusters"]) == (3 / 6, 6, 3)
    assert agreement["edit_similarity"]["value"] == pytest.approx((3 + 3 * 0.5) / 6)
    assert 0.5 < agreement["chrf"]["value"] < 1
    differences = found["differences"]
    # One row lost, two gained.
    assert differences["accuracy"]["value"] == pytest.approx(1 / 6)
    assert differences["accuracy"]["verdict"] == "not distinguishable"
    assert differences["accuracy"]["rows_that_would_tell"] > 6
    assert differences["vqa_accuracy"] is None
    # "red dog" is three of seven characters away from its reference; "blue cat" four of eight, which counts nothing.
    assert differences["anls"]["value"] == pytest.approx((4 / 7 - 1 + 2) / 6)
    assert differences["output_tokens"]["value"] == 0
    kv = differences["cross_kv_bytes"]
    assert (kv["value"], kv["low"], kv["high"]) == (-TOKENS_PER_TILE * TOKEN_BYTES / 2,) * 3
    assert kv["verdict"] == "lower"
    assert found["row_kv_ratio"] == 0.5
    # By answered row, seven with half and one with all; by output token, 2 a row and one of the last.
    assert (found["held_ratio"], found["read_ratio"], found["peak_ratio"]) == ((7 / 2 + 1) / 8, (7 / 2 + 1) / 15 * 2, 1)
    # 7 images in 2 × 2 seconds beside 8 in 3 × 4.
    assert found["speed_ratio"] == pytest.approx((8 / 12) / (7 / 4))
    assert found["cost_ratio"] == pytest.approx((7 / 4) / (8 / 12))
    assert set(found["examples"]) == {"3", "4", "5"}


def test_sides_are_told_apart(tmp_path: Path) -> None:
    # Inputs with other references: the baseline's count for both.
    write_run(tmp_path / "base", rows(["a", "b", "c", "d", None], ["a"] * 5, per_image=1))
    write_run(tmp_path / "mine", rows(["a", "a", None, None, "e"], ["b"] * 5, per_image=1), config={"policy": "grid"})
    made = build(tmp_path, "base", "mine")
    (found,) = made["comparisons"]
    assert (found["errors_in_run_only"], found["errors_in_baseline_only"], found["compared"]) == (2, 1, 2)
    assert found["differences"]["accuracy"]["value"] == 0.5
    # Each run's own score is by its own.
    assert [one["scores"]["accuracy"]["value"] for one in made["runs"]] == [0.2, 0.0]


def test_every_key_is_there_whatever_is_known(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rows(["x", None], images=0, image_digest=None))
    write_run(tmp_path / "b", [{"id": "other", "error": "broken", "question": "q"}], stats={"actor_seconds": 0.0})
    made = build(tmp_path, "a", "b")
    assert set(made) == {"made", "version", "baseline", "prices", "runs", "comparisons", "equal_kv"}
    (found,) = made["comparisons"]
    assert (found["joined"], found["only_in_run"], found["only_in_baseline"], found["compared"]) == (0, 1, 2, 0)
    nothing = {"value": None, "low": None, "high": None, "rows": 0, "clusters": 0}
    assert found["agreement"] == dict.fromkeys(("exact", "edit_similarity", "chrf"), nothing)
    unknown = nothing | {"verdict": "not distinguishable", "rows_that_would_tell": None}
    none = dict.fromkeys(("accuracy", "vqa_accuracy", "anls"))
    assert found["differences"] == {**none, "output_tokens": unknown, "cross_kv_bytes": unknown}
    assert {found[f"{name}_ratio"] for name in ("speed", "cost", "row_kv", "held", "read")} == {None}
    assert found["examples"] == []
    assert any("No row of one run" in said for said in found["warnings"])
    for run in made["runs"]:
        assert run["kept"] is None
        assert run["scores"] == none
        assert run["cost"]["dollars_per_million_images"] is None


def test_a_report_does_not_hang_on_how_rows_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i % 3} cats" for i in range(60)]
    answers = ["1 cats"] * 60
    write_run(tmp_path / "base", rows(texts, answers, per_image=3))
    mine = rows(list(reversed(texts)), answers, per_image=3)
    write_run(tmp_path / "mine", mine, config={"policy": "grid"})
    first = build(tmp_path, "base", "mine")
    monkeypatch.setattr(joins, "JOIN_ROWS", 7)
    monkeypatch.setattr(runs, "CHUNK_ROWS", 5)
    again = build(tmp_path, "base", "mine")
    # The others add up whole numbers and halves.
    chrf = [made["comparisons"][0]["agreement"].pop("chrf") for made in (first, again)]
    assert chrf[0]["value"] == pytest.approx(chrf[1]["value"], abs=1e-12)
    first["made"] = again["made"]
    assert first == again


def test_examples_are_of_both_kinds(tmp_path: Path) -> None:
    # 4 rows where the run alone is right, 20 where the baseline is, 20 that differ and are both wrong, 6 the same.
    answers = ["yes"] * 50
    write_run(tmp_path / "base", rows(["no"] * 4 + ["yes"] * 20 + ["a"] * 20 + ["yes"] * 6, answers))
    write_run(tmp_path / "mine", rows(["yes"] * 4 + ["no"] * 20 + ["b"] * 20 + ["yes"] * 6, answers), config={"policy": "grid"})

    def kinds(wanted: int) -> list[int]:
        (found,) = build(tmp_path, "base", "mine", examples=wanted)["comparisons"]
        picked = [int(id) for id in found["examples"]]
        assert len(set(picked)) == len(picked)
        return [sum(low <= id < high for id in picked) for low, high in ((0, 4), (4, 24), (24, 44), (44, 50))]

    assert kinds(6) == [3, 3, 0, 0]
    assert kinds(10) == [4, 6, 0, 0]
    assert kinds(30) == [4, 20, 6, 0]
    assert kinds(100) == [4, 20, 20, 0]
    assert kinds(0) == [0, 0, 0, 0]


def test_examples_without_references_are_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "base", rows(["a"] * 300))
    write_run(tmp_path / "mine", rows(["b"] * 300), config={"policy": "grid"})
    picked = [int(id) for id in build(tmp_path, "base", "mine")["comparisons"][0]["examples"]]
    assert len(picked) == 10
    # Not the first ten: of the whole run.
    assert max(picked) > 150


def test_references_by_people_are_scored_by_consensus(tmp_path: Path) -> None:
    answers = [["red"] * 2 + ["blue"] * 8, ["red"] * 10]
    write_run(tmp_path / "base", rows(["blue", "red"], answers, per_image=1))
    write_run(tmp_path / "mine", rows(["red", "red"], answers, per_image=1), config={"policy": "grid"})
    made = build(tmp_path, "base", "mine")
    base, mine = (run["scores"] for run in made["runs"])
    assert (base["vqa_accuracy"]["value"], mine["vqa_accuracy"]["value"]) == (1.0, pytest.approx(0.8))
    assert mine["accuracy"]["value"] == mine["anls"]["value"] == 1.0
    assert made["comparisons"][0]["differences"]["vqa_accuracy"]["value"] == pytest.approx(-0.2)


def test_another_column_of_references(tmp_path: Path) -> None:
    given = [{"id": "a", "text": "x", "truth": "x", "answer": "y"}, {"id": "b", "text": "x", "truth": "z", "answer": "y"}]
    write_run(tmp_path / "base", given)
    write_run(tmp_path / "mine", given, columns={"truth": "truth", "answer": "answer"})
    assert build(tmp_path, "base", "mine")["runs"][0]["scores"]["accuracy"]["value"] == 0
    assert build(tmp_path, "base", "mine", references="truth")["runs"][0]["scores"]["accuracy"]["value"] == 0.5
    with pytest.raises(ValueError, match="references='text' is a column of no run's input; there are truth, answer"):
        build(tmp_path, "base", "mine", references="text")


def test_a_renamed_column_of_references_is_found(tmp_path: Path) -> None:
    # An input column that bore an output column's name came out under another.
    given = [{"id": "a", "text": "x", "input_text": "x"}]
    for name in ("base", "mine"):
        write_run(tmp_path / name, given, columns={"text": "input_text"}, config={"answer_column": "text"})
    assert build(tmp_path, "base", "mine")["runs"][1]["scores"]["accuracy"]["value"] == 1


def test_each_policy_stands_beside_fewer_tiles_at_equal_kv(tmp_path: Path) -> None:
    right, answers = ["yes"] * 12, ["yes"] * 12
    write_run(tmp_path / "full", rows([*right], answers, tiles=4))
    some = ["yes"] * 9 + ["no"] * 3
    write_run(tmp_path / "one", rows(some, answers, tiles=1), config={"max_tiles": 1})
    write_run(tmp_path / "two", rows([*right], answers, tiles=2), config={"max_tiles": 2})
    write_run(tmp_path / "k", rows([*right], answers, tiles=4, keep_fraction=0.25), config={"policy": "trimmed-llama"})
    write_run(tmp_path / "grid", rows([*right], answers, tiles=4, keep_fraction=0.75), config={"policy": "grid"})
    found = build(tmp_path, "full", "one", "two", "k", "grid")["equal_kv"]
    assert [(one["run"], one["tiles_run"], one["by"], one["ratio"], one["score"]) for one in found] == [
        ("k", "one", "held", 1.0, "accuracy"),
        ("grid", "two", "held", 1.5, "accuracy"),
    ]
    assert found[0]["difference"]["value"] == 0.25
    assert found[1]["difference"]["value"] == 0


def test_what_the_tower_was_left_with_is_told(tmp_path: Path) -> None:
    answers = ["yes"] * 12
    write_run(tmp_path / "full", rows(answers, answers, tiles=4))
    write_run(tmp_path / "one", rows(answers, answers, tiles=1), config={"max_tiles": 1})
    less = rows(answers, answers, tiles=4, keep_fraction=0.25, tower_keep_fraction=0.5)
    write_run(tmp_path / "tower", less, config={"tower_policy": "alike", "tower_keep": 0.5})
    found = build(tmp_path, "full", "one", "tower")
    assert [run["tower"] for run in found["runs"]] == [None, None, "alike 0.5"]
    assert [run["tower_kept"] for run in found["runs"]] == [1.0, 1.0, 0.5]
    # It holds less, and so stands beside fewer tiles though no policy is behind it.
    assert [(one["run"], one["tiles_run"], one["ratio"]) for one in found["equal_kv"]] == [("tower", "one", 1.0)]


def test_nearest_is_meant_by_the_ratio_of_bytes(tmp_path: Path) -> None:
    # 9 tokens of 16: nearer to 4 in tokens, and to 16 as a ratio.
    for name, tiles in (("full", 4), ("one", 1), ("four", 4)):
        write_run(tmp_path / name, rows(["x"] * 4, tiles=tiles), config={} if name == "full" else {"max_tiles": tiles})
    write_run(tmp_path / "k", rows(["x"] * 4, tiles=4, keep_fraction=9 / 16), config={"policy": "trimmed-llama"})
    (found,) = build(tmp_path, "full", "one", "four", "k")["equal_kv"]
    assert (found["tiles_run"], found["ratio"]) == ("four", 9 / 16)


def test_the_cheap_alternative_is_the_one_that_held_as_much(tmp_path: Path) -> None:
    """A row's own cache is as small as one tile's, but rows about one image kept sets of their own: held were two tiles'."""
    sizes = {"full": 4, "one": 1, "two": 2}
    for name, tiles in sizes.items():
        config = {} if name == "full" else {"max_tiles": tiles}
        write_run(tmp_path / name, rows(["x"] * 8, ["x"] * 8, tiles=tiles), config=config)
    trimmed = rows(["x"] * 8, ["x"] * 8, tiles=4, keep_fraction=0.25)
    twice = {"cross_kv_byte_seconds": 2.0 * 4 * TOKENS_PER_TILE * TOKEN_BYTES}
    config = {"policy": "trimmed-llama"}
    write_run(tmp_path / "k", trimmed, config=config, stats=twice)
    (found,) = build(tmp_path, *sizes, "k")["equal_kv"]
    assert (found["tiles_run"], found["by"], found["ratio"]) == ("two", "held", 1.0)
    # Unknown in one of them, or in seconds of another machine: by rows' own caches, and that is said.
    for name, settings in (("old", {"stats": {"cross_kv_byte_seconds": None}}), ("gpu", {"stats": twice, "device": "H200"})):
        write_run(tmp_path / name, trimmed, config=config, **settings)
        (found,) = build(tmp_path, *sizes, name)["equal_kv"]
        assert (found["tiles_run"], found["by"], found["ratio"]) == ("one", "row_kv", 1.0)


def test_a_trimmed_run_that_held_more_is_told_with_a_warning(tmp_path: Path) -> None:
    """Rows' own caches say half; six sets where all features need one say three times."""
    write_run(tmp_path / "full", rows(["a cat"] * 8))
    more = {
        "peak_cross_kv_bytes": 6000,
        "cross_kv_byte_seconds": 1.5 * 4 * TOKENS_PER_TILE * TOKEN_BYTES,
        "cross_kv_byte_seconds_full": 4 * TOKENS_PER_TILE * TOKEN_BYTES / 2,
    }
    write_run(tmp_path / "k", rows(["a cat"] * 8, keep_fraction=0.5), config={"policy": "trimmed-llama"}, stats=more)
    made = build(tmp_path, "full", "k")
    (found,) = made["comparisons"]
    assert (found["row_kv_ratio"], found["held_ratio"], found["peak_ratio"]) == (0.5, 1.5, 3)
    assert made["runs"][1]["held"]["of_full"] == 3
    between, within = found["warnings"]
    assert between == "k trims and holds more cross KV than full: 5.9 KiB at its peak beside 2.0 KiB (3.00×)."
    assert within.startswith("k held 3.00× what all features would have (by formula): rows about one image kept different sets")


def test_a_run_that_did_not_count_is_unknown(tmp_path: Path) -> None:
    write_run(tmp_path / "full", rows(["a cat"] * 8))
    older = dict.fromkeys(("cross_kv_byte_seconds", "cross_kv_byte_seconds_full", "cross_kv_bytes_read"))
    write_run(tmp_path / "k", rows(["a cat"] * 8, keep_fraction=0.5), config={"policy": "trimmed-llama"}, stats=older)
    made = build(tmp_path, "full", "k")
    (found,) = made["comparisons"]
    assert (found["held_ratio"], found["read_ratio"], found["peak_ratio"], found["row_kv_ratio"]) == (None, None, 1, 0.5)
    assert set(made["runs"][1]["held"].values()) == {None}
    (said,) = found["warnings"]
    assert said.startswith("k was made by an older version that did not count what was held and read")


@pytest.mark.parametrize(("job", "score"), [("answer", "exact"), ("caption", "chrf")])
def test_without_references_agreement_with_the_baseline_is_compared(tmp_path: Path, job: str, score: str) -> None:
    config = {"job": job, "prompt": "Say it." if job == "caption" else None}
    write_run(tmp_path / "full", rows(["a cat"] * 8), config=config)
    write_run(tmp_path / "one", rows(["a cat"] * 4 + ["no"] * 3 + [None]), config={**config, "max_tiles": 1})
    write_run(tmp_path / "k", rows(["a cat"] * 6 + ["no"] * 2), config={**config, "policy": "trimmed-llama"})
    (found,) = build(tmp_path, "full", "one", "k")["equal_kv"]
    assert (found["run"], found["tiles_run"], found["score"]) == ("k", "one", score)
    # Over seven rows: six agree beside four.
    assert (found["difference"]["value"], found["difference"]["rows"]) == (pytest.approx(2 / 7), 7)
    # Beside the baseline itself there is nothing to measure it by.
    assert build(tmp_path, "one", "full", "k")["equal_kv"] == []
