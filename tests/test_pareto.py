"""``make pareto``: who takes part, the search for equal cost, the journal, the page's words, and a tiny run of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pareto, pareto_bench, pareto_page, pareto_plots, pareto_results, pareto_run
from benchmarks.pareto_bench import Bench, DataSet
from benchmarks.pareto_contenders import (
    ALL_ROWS,
    BEHIND,
    BY_QUESTION,
    CONTENDERS,
    FEWER,
    OURS,
    POOLED,
    REAL,
    REFERENCE,
    WAYS,
    WHOLE,
    View,
    Way,
    of_channels,
)
from benchmarks.pareto_contenders import POLICIES as FAMILIES
from benchmarks.pareto_run import TOLERANCE, Entry, Journal, Study, code_of, find
from benchmarks.pareto_speed import end_to_end, shown_as_fast
from benchmarks.timing import median_interval
from demo import MODEL, scenes, shards
from demo.shards import Row
from demo.table import sha256
from pipeline.config import POLICIES, TOWER_POLICIES
from pipeline.pictures import decode
from trimming import Clusters, FastV, Grid, KeepAll, ThinK, TrimmedLlama, VisionZip
from trimming.tower import Alike, GridRows, ToMe

# ---- contenders -------------------------------------------------------------------------------------------------------------


def test_every_policy_takes_part() -> None:
    taking = {type(each.make(0.5)).__name__ for each in CONTENDERS}
    assert taking == {kind for kind, _ in POLICIES.values()} - {"KeepAll"}
    assert {each.name for each in CONTENDERS if each.control} == {"random", "grid"}
    by_question = {each.name.removesuffix(BY_QUESTION) for each in CONTENDERS if each.kept_sets == "question"}
    assert by_question == {each.name for each in FAMILIES if each.make(0.5).where != "features"}


def test_every_way_through_the_tower_takes_part() -> None:
    taking = {type(way.view.tower_policy) for way in WAYS} - {type(None)}
    assert {kind.__name__ for kind in taking} == set(TOWER_POLICIES.values())
    assert {way.view.tower_tiles for way in WAYS} == {"all", "pooled", "real"}
    assert len({(way.name, way.parameter) for way in WAYS}) == len(WAYS)


def test_key_channels_take_half_of_the_bytes_at_least() -> None:
    assert of_channels(0.7) == pytest.approx(0.4)
    assert of_channels(0.5) == pytest.approx(0, abs=1e-5)
    assert of_channels(0.3) is None


def test_a_policy_is_keyed_by_its_own_code() -> None:
    assert code_of(FastV(0.5)) == code_of(FastV(0.1)) != code_of(Grid(0.5))
    assert code_of(ThinK(0.5)) != code_of(ThinK(0.5, VisionZip(0.5)))
    assert code_of(KeepAll(), Alike(0.5)) != code_of(KeepAll(), ToMe(0.5)) != code_of(KeepAll())


def test_a_policy_is_not_keyed_by_anothers_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        return [code_of(KeepAll()), code_of(FastV(0.5)), code_of(KeepAll(), GridRows(0.5)), code_of(KeepAll(), Alike(0.5))]

    def saved(name: str) -> list[bool]:
        """Which keys are others once the file is."""
        with monkeypatch.context() as patch:
            patch.setattr(pareto_run, "sha256", lambda path: "other" if path.match(name) else sha256(path))
            return [one != other for one, other in zip(keys(), before, strict=True)]

    before = keys()
    assert saved("trimming/policies/fastv.py") == [False, True, False, False]
    assert saved("trimming/tower/tome.py") == [False, False, False, True], "which Alike is made from"
    assert saved("trimming/tower/policy.py") == [True] * 4
    assert saved("benchmarks/pareto_bench.py") == [True] * 4


# ---- the search -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.97])
def test_search_finds_a_share(share: float) -> None:
    parameter, came = find(lambda p: p**0.5, share, {})
    assert came == parameter**0.5
    assert abs(came - share) <= TOLERANCE


def test_search_takes_the_nearest_step() -> None:
    tried: list[float] = []

    def steps(parameter: float) -> float:
        tried.append(parameter)
        return max(1, round(parameter * 10)) / 10

    seen: dict[float, float] = {}
    assert find(steps, 0.34, seen)[1] == 0.3
    assert len(tried) <= 12
    before = len(tried)
    assert find(steps, 0.3, seen)[1] == 0.3
    assert len(tried) == before, "what is known is not asked again"


# ---- the journal ------------------------------------------------------------------------------------------------------------


def test_journal_continues_and_drops_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    assert Journal(file).once("a", lambda: {"rows": 1}) == {"key": "a", "rows": 1}
    file.write_text(file.read_text() + '{"key": "b", "ro')
    again = Journal(file)
    assert again.once("a", lambda: {"rows": 2})["rows"] == 1
    assert again.once("b", lambda: {"rows": 3})["rows"] == 3
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "b"]


# ---- the page ---------------------------------------------------------------------------------------------------------------


def hand_made() -> dict[str, Any]:
    """40 images, two questions each. At 0.15 grid is right everywhere, trimmed-llama on every other row, spread on none, nor
    fastv, which holds more; fewer tiles cost as much and are wrong everywhere; at 0.5 all are right."""
    rows = [Row(b"", f"image {i // 2}", "?", "!", f"row {i}", ("color", "shape")[i % 2]) for i in range(80)]

    def point(contender: str, target: float | None, share: float, right: str, view: View = WHOLE) -> dict[str, Any]:
        cell = {
            "rows": 80,
            "held_bytes": round(share * 81920),
            "held_byte_seconds": share * 800,
            "output_tokens": 80,
            "prefill": 0.08,
            "decode": 0.04,
            "right": right * 40,
        }
        return pareto_results.point(Entry(contender, target, share, view=view), [cell])

    points = [point("all features", None, 1.0, "11")]
    points += [point(name, 0.5, 0.5, "11") for name in (REFERENCE, "fastv", "think", "random", "grid")]
    points += [point(REFERENCE, 0.15, 0.15, "10"), point("fastv", 0.15, 0.19, "00")]
    points += [point("spread", 0.15, 0.15, "00")]
    points += [point("random", 0.15, 0.15, "10"), point("grid", 0.15, 0.15, "11")]
    points += [point("fewer tiles", None, 0.152, "00", View(max_tiles=1))]

    def way(name: str, parameter: float | None, seconds: float, right: str, tower: float = 1.0) -> tuple[Way, list[Any]]:
        """Eight blocks of five images; each block takes a little longer than the one before."""
        cell = {"rows": 10, "images_encoded": 5, "held_bytes": tower * 1e6, "right": right * 5, "preparing": 0.5}
        cell |= {"tower_keep_fraction": tower, "tower": seconds, "prefill": 0.1, "decode": 0.1}
        cells = [cell | {"wall": 5 * seconds * (1 + block / 100) - 0.5} for block in range(8)]
        return Way(name, parameter), cells

    # A rival twice as fast, with which our 0.7 is level and our 0.5 faster; one that nothing of ours is as fast as.
    ways = [way(ALL_ROWS, None, 2.0, "11"), way(POOLED, None, 1.5, "11"), way(OURS, 0.7, 1.0, "11", 0.7)]
    ways += [way(OURS, 0.5, 0.5, "10", 0.5), way(BEHIND, 0.7, 0.9, "10", 0.3), way("grid rows", 0.7, 0.9, "00", 0.7)]
    ways += [way(REAL, None, 1.0, "10"), way(FEWER, 1, 0.25, "00"), way("a new way", 0.5, 0.7, "10", 0.5)]
    return {
        "targets": [0.5, 0.15],
        "reference": REFERENCE,
        "contenders": [REFERENCE, "fastv", "spread", "think", "of our own", "random", "grid"],
        "controls": ["random", "grid"],
        "conditions": {"torch": "1.2.3"},
        "sets": {
            "made up": {
                **pareto_results.compared(points, rows),
                "tower_ms_per_image": {"as they are": 9.0},
                "end_to_end": end_to_end([each for each, _ in ways], [cells for _, cells in ways], rows),
                "model_sha256": "0123456789abcdef",
            }
        },
    }


def test_page_says_where_a_control_wins() -> None:
    page = pareto_page.markdown(hand_made())
    assert "| trimmed-llama | **100.0 ± 0.0** | 50.0 ± 0.0 |" in page
    assert "| fastv | **100.0 ± 0.0** | 0.0 ± 0.0 † |" in page, "no verdict at other bytes"
    assert "| think | **100.0 ± 0.0** | – |" in page
    assert "| grid (control) | **100.0 ± 0.0** | **100.0 ± 0.0** ↑ |" in page
    assert "| trimmed-llama | – | grid +50.0 (+50.0 to +50.0) |" in page
    assert "| spread | – | random +50.0 (+50.0 to +50.0), grid +100.0 (+100.0 to +100.0) |" in page
    assert "| policy | color | shape |" in page
    assert "| trimmed-llama | – | 0.15 |" in page
    assert "| spread | 0.15 | 0.15 |" in page
    assert "at 0.15: trimmed-llama, spread" in page
    assert "- At 0.15: on all sets grid" in page
    assert "- At 0.5: nothing on all sets." in page
    assert "| 1 tile at most | 15.2 | 1.50 | 0.0 ± 0.0 | 15.0 | −50.0 (−50.0 to −50.0): worse |" in page
    assert "of our own" not in page, "what was not measured has no row"


def test_page_compares_ways_at_equal_speed() -> None:
    page = pareto_page.markdown(hand_made())
    row = "| alike | 0.7 | 70.0 | 1.0 | 2.00 (2.00 to 2.00) | 1.50 | 200.0 | 70.0 | 100.0 ± 0.0 | 0.0 (0.0 to 0.0): not "
    assert row in page
    assert "| alike | 0.5 | 50.0 | 1.9 | 4.00 (4.00 to 4.00) | 3.00 | 100.0 | 50.0 | 50.0 ± 0.0 | −50.0 (" in page
    matched = "| real tiles | 50.0 ± 0.0 | alike 0.7 | 1.00 (1.00 to 1.00) | 100.0 ± 0.0 | +50.0 (+50.0 to +50.0): better |"
    assert matched in page, "the slowest that is as fast"
    matched = "| grid rows (control) 0.7 | 0.0 ± 0.0 | alike 0.5 | 1.80 (1.80 to 1.80) | 50.0 ± 0.0 | +50.0 (+50.0 to +50.0): "
    assert matched in page
    missed = "| fewer tiles 1 | 0.0 ± 0.0 | alike 0.5 | 0.50 (0.50 to 0.50) | 50.0 ± 0.0 | none is shown to be as fast |"
    assert missed in page
    assert "than 0.5 points alike 0.7, 2.00 (2.00 to 2.00) ×" in page


def test_as_fast_is_not_by_luck() -> None:
    assert shown_as_fast({"value": 1.2, "low": 1.0, "high": 1.4})
    assert not shown_as_fast({"value": 1.2, "low": 0.9, "high": 1.4})
    assert shown_as_fast({"value": 1.0, "low": None, "high": None}), "of fewer than six blocks"


def test_a_medians_interval_holds_it_95_times_in_100() -> None:
    assert median_interval([3, 1, 2, 5, 4]) == (None, None), "of five values least and most hold it 94 times"
    assert median_interval([6, 3, 1, 2, 5, 4]) == (1, 6)
    assert median_interval(range(10)) == (1, 8)


def test_three_sets_have_a_plot_each_and_say_who_answered_them() -> None:
    report = hand_made()
    (data,) = report["sets"].values()
    report["sets"] = {"one": data, "two": data, "three": {**data, "model_sha256": "fedcba9876543210"}}
    page = pareto_page.markdown(report)
    assert "one by model 0123456789ab, two by model 0123456789ab, three by model fedcba987654." in page
    for svg in pareto_plots.plots(report).values():
        assert all(svg.count(f"{name}, 80 questions") == 1 for name in report["sets"])


def test_page_bolds_what_is_best_by_kind() -> None:
    page = pareto_page.markdown(hand_made())
    assert "| policy | color (40) | shape (40) |" in page
    assert "| trimmed-llama | **100.0 ± 0.0** | 0.0 ± 0.0 |" in page


def test_plots_name_every_line() -> None:
    plots = pareto_plots.plots(hand_made())
    assert plots.keys() == {"pareto-kv", "pareto-byte-seconds", "pareto-time", "pareto-speed", "pareto-tower-kv"}
    timed = {"pareto-speed", "pareto-tower-kv"}
    for plot, svg in plots.items():
        bytes_held = (REFERENCE, "fastv", "think", "random", "grid", "fewer tiles", "all features")
        for name in (ALL_ROWS, OURS, REAL, FEWER, "a new way") if plot in timed else bytes_held:
            assert svg.count(f">{name}<") >= 1
        assert "made up, 80 questions" in svg


# ---- a tiny run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Callable[[], Study]:
    data = DataSet("scenes-test", list(shards.scene_rows("test", 8, scenes.KINDS[:2])), blocks=2)

    def begin() -> Study:
        return Study(Bench(MODEL), Journal(tmp_path / "cells.jsonl"), data, lambda _: None)

    return begin


def test_tiny_run_at_equal_cost(study: Callable[[], Study], monkeypatch: pytest.MonkeyPatch) -> None:
    first = study()
    two = [each for each in CONTENDERS if each.name in (REFERENCE, "visionzip")]
    ways = [way for way in WAYS if way.name in (ALL_ROWS, POOLED, OURS, REAL)]
    ways.append(Way.through(BEHIND, Alike(0.6), Clusters(keep=0.5)))
    plan = first.plan(two, (0.5, 0.15))
    assert [(e.contender, e.target) for e in plan[:5]] == [("all features", None)] + [
        (each.name, target) for each in two for target in (0.5, 0.15)
    ]
    assert {e.contender for e in plan[5:]} == {"fewer tiles", "lower resolution", REFERENCE}
    pareto.measure([(first, plan, ways)], lambda _: None)
    report = pareto_results.result([(first, plan, ways)], lambda _: None)

    data = report["sets"]["scenes-test"]
    assert (data["rows"], data["images"]) == (16, 8)
    for point in data["points"]:
        assert point["ms_per_row"]["both"] > 0
        if point["target"] and point["contender"] in (REFERENCE, "visionzip"):
            assert point["share"] == pytest.approx(point["sought_share"], abs=0.05)
    assert data["points"][0]["share"] == 1
    assert data["points"][0]["accuracy"]["all"]["value"] >= 0.75
    assert "visionzip" in pareto_page.markdown(report)
    # No policy's seconds hold the tower's: images were seen before.
    cells = [first.journal.lines[first.key(entry, 0)] for entry in plan]
    assert all(cell["images_encoded"] == 0 and cell["tower"] == 0 for cell in cells)
    # End to end each pays for every image once, whatever was encoded before.
    for cell in (cell for cells in first.cells_of_ways(ways) for cell in cells):
        assert cell["images_encoded"] == 4
        assert cell["tower"] > 0
    held = {point["contender"]: point for point in data["end_to_end"]["points"]}
    assert held[ALL_ROWS]["share"] == held[REAL]["share"] == 1
    assert held[BEHIND]["tower_keep_fraction"] == pytest.approx(0.6, abs=0.03)
    assert held[BEHIND]["share"] < 0.2
    assert all(match["more"].keys() == data["kinds"].keys() for match in data["end_to_end"]["at_equal_speed"])

    # Begun again, it measures nothing.
    monkeypatch.setattr(Bench, "_answers", None)
    again = study()
    assert again.plan(two, (0.5, 0.15)) == plan
    assert not any(again.todo(plan, ways, block) for block in range(2))
    assert pareto_results.result([(again, plan, ways)], lambda _: None)["sets"] == report["sets"]
    # Seconds are compared within a block: one more way, and all take their turns again.
    assert [work.kind for work in again.todo(plan, [*ways, Way("of our own")], 1)] == ["scenes-test end to end"]


def test_ways_end_to_end_know_nothing_of_their_images(study: Callable[[], Study], monkeypatch: pytest.MonkeyPatch) -> None:
    one, opened = study(), []
    rows = one.data.block(0)
    one.bench.answers(KeepAll(), rows, WHOLE)
    monkeypatch.setattr(pareto_bench, "decode", lambda image: opened.append(image) or decode(image))
    for way in (Way(POOLED), Way(POOLED), Way(OURS, view=View(tower_policy=Alike(0.6)))):
        opened.clear()
        assert one.bench.end_to_end(way, rows)["images_encoded"] == len(opened) == 4
    opened.clear()
    one.bench.answers(KeepAll(), rows, WHOLE)
    assert not opened


def test_images_of_one_tile_have_no_fewer(tmp_path: Path) -> None:
    rows = [list(each) for each in islice(shards.easy_vqa_rows("test", shards.EASY_VQA_QUESTIONS["test"]), 2)]
    one = Study(Bench(MODEL), Journal(tmp_path / "cells.jsonl"), DataSet("easy-vqa-test", rows, 1), lambda _: None)
    assert {way.name for way in WAYS} - {way.name for way in one.ways()} == {FEWER}


def test_policies_of_all_kinds_share_what_is_encoded(study: Callable[[], Study]) -> None:
    one = study()
    rows = one.data.block(0)
    for policy in (KeepAll(), ThinK(0.5), VisionZip(0.5), TrimmedLlama(0.25), KeepAll()):
        cell = one.bench.answers(policy, rows, WHOLE)
        assert cell["images_encoded"] == 0
    # An image at another size is another image.
    small = one.bench.answers(KeepAll(), rows, replace(WHOLE, scale=0.5))
    assert small["held_bytes"] < cell["held_bytes"]


def test_questions_share_what_an_image_keeps(study: Callable[[], Study]) -> None:
    one = study()
    rows = one.data.block(0)
    full, by_image, by_question = (
        one.bench.answers(policy, rows, WHOLE, kept_sets)["held_bytes"]
        for policy, kept_sets in ((KeepAll(), "image"), (FastV(0.5), "image"), (FastV(0.5), "question"))
    )
    # Two questions an image, half of the features each.
    assert by_image == pytest.approx(full / 2, rel=0.02)
    assert by_question == pytest.approx(full, rel=0.02)
