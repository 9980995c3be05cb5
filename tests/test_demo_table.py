"""The measured table: its columns, its controls, its page, and that it continues where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo import MODEL, PHOTO_MODEL, answerer, table
from demo.shards import EASY_VQA_QUESTIONS, Row
from pipeline.engine import Answer
from trimming import Clusters, Grid, KeepAll, Policy, Random, TrimmedLlama
from trimming.engine import Statistics
from trimming.tower import Alike, TowerPolicy

RESULTS = table.ROOT / "demo/results"
ANEW = "`make demo-table` measures anew what lies in demo/results (half an hour)"


class FakeBatch:
    def __init__(self, policy: Policy, kept_sets: str, tower: float) -> None:
        self.policy, self.kept_sets, self.statistics, self.seconds = policy, kept_sets, Statistics(), {"tower": tower}
        self.tower = SimpleNamespace(tower_tiles="pooled", policy=None)

    def reset_statistics(self) -> None:
        share = 4 if isinstance(self.policy, KeepAll) else 3 if self.kept_sets == "question" else 2
        held = {"peak_cross_kv_bytes": 10 * share, "cross_kv_byte_seconds": 100.4 * share, "cross_kv_bytes_read": 500 * share}
        self.statistics, self.seconds = Statistics(**held), {"prefill": 1.0 * share, "decode": 0.5 * share}


class FakeAnswerer:
    """Answers color questions rightly and, with all features, shape questions; keeps half unless
    told to keep all; sees as many tiles as the scene's number."""

    calls: list[str]
    fail_at: str | None = None

    def __init__(self, _: Path) -> None:
        FakeAnswerer.calls = []

    def engine(self, policy: Policy, tower_tiles: str, kept_sets: str, tower_policy: TowerPolicy | None) -> Any:
        FakeAnswerer.calls.append(f"{policy!r}, {tower_tiles} tiles, by {kept_sets}, {tower_policy}")
        if FakeAnswerer.fail_at and FakeAnswerer.fail_at in repr(policy):
            raise KeyboardInterrupt
        return SimpleNamespace(batch=FakeBatch(policy, kept_sets, 3.0 if tower_tiles == "real" else 12.0))

    def encode(self, engine: Any, rows: list[Row]) -> None:
        engine.batch.statistics.images_encoded = 4

    def answer(self, engine: Any, rows: list[Row]) -> Iterator[answerer.Answered]:
        kept = 64 if isinstance(engine.batch.policy, KeepAll) else 32
        for row in rows:
            said = Answer(
                text=row.answer if row.kind == "color" or (row.kind == "shape" and kept == 64) else "no such answer",
                finish_reason="stop",
                prompt_tokens=9,
                output_tokens=3,
                visual_tokens=64,
                kept_visual_tokens=kept,
                keep_fraction=kept / 64,
                tower_keep_fraction=1.0,
                cross_kv_bytes_full=64,
                cross_kv_bytes=kept,
                self_kv_bytes=1,
                kept=[],
            )
            yield answerer.Answered(row, said, 1 + int(row.id.split("/")[2]) if "scenes/" in row.id else 1)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(answerer, "Answerer", FakeAnswerer)
    monkeypatch.setattr(FakeAnswerer, "fail_at", None)
    folders = {name: tmp_path / name for name in ("model", "photo-model")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    sizes = ["--easy-vqa", "50", "--scenes", "4", "--photo-scenes", "2"]
    models = [f"--{name}={folder}" for name, folder in folders.items()]
    return [*models, *sizes, "--output", str(tmp_path / "results")]


def test_each_k_has_both_kinds_of_kept_sets_and_three_have_controls() -> None:
    labels = list(table.labels())
    assert labels[:7] == [
        "full",
        "pooled",
        "real-tiles",
        "trimmed-llama 0.4",
        "by-question 0.4",
        "trimmed-llama 0.25",
        "by-question 0.25",
    ]
    assert labels[7:9] == ["random 0.25", "grid 0.25"]
    assert labels[19:23] == ["share 0.1", "clusters 0.9", "clusters 0.8", "clusters 0.7"]
    assert labels[23:] == ["tower 0.53", "tower 0.45", "tower-and-share 0.53"]
    assert [label for label in labels if table.tower_tiles_of(label) != "pooled"] == ["full", "real-tiles"]
    assert [label for label in labels if table.tower_policy_of(label)] == labels[23:]
    assert table.tower_policy_of("tower 0.45") == Alike(0.45)
    assert {label for label in labels if table.kept_sets_of(label) == "question"} == {
        f"by-question {k}" for k in table.K_RATIOS
    }


def test_controls_take_the_kept_fraction_that_was_measured() -> None:
    results = {"trimmed-llama 0.15": {"keep_fraction": 0.4567}}
    assert table.policy_of("full", results) == table.policy_of("real-tiles", results) == KeepAll()
    assert table.policy_of("trimmed-llama 0.15", results) == TrimmedLlama(k_ratio=0.15)
    assert table.policy_of("by-question 0.15", results) == TrimmedLlama(k_ratio=0.15)
    assert table.policy_of("clusters 0.9", results) == Clusters(likeness=0.9)
    assert table.policy_of("share 0.1", results) == Clusters(keep=0.1)
    assert table.policy_of("random 0.15", results) == Random(keep=0.4567)
    assert table.policy_of("grid 0.15", results) == Grid(keep=0.4567)
    assert table.policy_of("tower 0.45", results) == table.policy_of("pooled", results) == KeepAll()
    assert table.policy_of("tower-and-share 0.53", results) == Clusters(keep=0.4)


def test_report_and_page(arguments: list[str], tmp_path: Path) -> None:
    assert table.main(arguments) == 0
    report = json.loads((tmp_path / "results/accuracy.json").read_text())
    assert {name: one["results"]["full"]["rows"] for name, one in report["sets"].items()} == {
        "easy-vqa-test": 50,
        "scenes-test": 24,
        "photo-scenes-test": 12,
    }
    scenes = report["sets"]["scenes-test"]["results"]
    assert list(scenes) == list(table.labels())
    assert scenes["full"]["kinds"]["color"] == {"rows": 4, "right": 4}
    assert scenes["full"]["rows"] == 24
    assert scenes["full"]["tiles"] == {str(count): {"rows": 6, "right": 2} for count in (1, 2, 3, 4)}
    assert scenes["full"]["accuracy"] == round(2 / 6, 4)
    assert scenes["full"]["lost"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert sum(table.each_right(scenes["full"])) == 8
    # One row in six on every image: images that are all alike make no spread.
    assert scenes["grid 0.15"]["lost"] == {"value": 0.16667, "low": 0.16667, "high": 0.16667}
    assert scenes["random 0.05"]["policy"] == "Random(keep=0.5, seed=0)"
    assert report["sets"]["scenes-test"]["conditions"]["dtype"] == "float32"
    page = (tmp_path / "results/accuracy.md").read_text()
    assert "|  | easy-vqa-test: right · lost · held | scenes-test: right · lost · held | photo-scenes-test:" in page
    assert "| 33.3 ·  · 1.00 × | 33.3 ·  · 1.00 × |" in page
    (grid,) = [line for line in page.splitlines() if line.startswith("| grid, as many as K = 0.15 | ")]
    assert grid.endswith(" | 16.7 · 16.7 (16.7 to 16.7) · 0.50 × | 16.7 · 16.7 (16.7 to 16.7) · 0.50 × |")
    assert "| K = 0.1, a set a question | " in page
    assert "| question | rows | full | pooled | real tiles | K = 0.25 | random | grid | K = 0.15 | random | grid |" in page
    assert (
        "| clusters, 10% | clusters 0.9 | clusters 0.8 | clusters 0.7 | tower at 0.53 | tower at 0.45 | tower at 0.53, " in page
    )
    assert "| color | 4 | 100.0 |" in page
    assert "| on images of 3 tiles | 6 | 33.3 | 33.3 | 33.3 | 16.7 |" in page
    assert "| lost |  |  | 0.0 (0.0 to 0.0) | 0.0 (0.0 to 0.0) | 16.7 (16.7 to 16.7) |" in page
    assert "| texts as full's |  | 100.0 | 100.0 | 100.0 | 83.3 |" in page
    assert "| easy-vqa-test | 50 on 1 tile | 4 | 12.0 | 12.0 | 3.0 | 12.0 | 12.0 |" in page
    assert scenes["pooled"]["same_texts"] == 1
    assert [label for label in scenes if "texts" in scenes[label]] == ["full"]
    assert "| all but captions | 20 | 40.0 |" in page
    assert "| features kept |  | 100.0 | 100.0 | 100.0 | 50.0 |" in page
    assert "| peak held |  | 1.00 × | 1.00 × | 1.00 × | 0.50 × | 0.50 × | 0.50 × |" in page
    assert "- full: caption 0.0, count 0.0, letter 0.0, position 0.0\n" in page
    assert "saved" not in page


def test_kept_sets_of_both_kinds_are_ranked_by_what_they_held() -> None:
    same: table.Result = {
        "accuracy": 0.8,
        "keep_fraction": 0.3,
        "lost": {"value": 0.01, "low": -0.005, "high": 0.025},
        "cross_kv_byte_seconds": 10,
        "cross_kv_bytes_read": 10,
    }
    results = {label: same | {"kept_sets": table.kept_sets_of(label)} for label in table.labels()}
    for place, (label, result) in enumerate(results.items()):
        results[label] = result | {"peak_cross_kv_bytes": 1_000 - place}
    results["by-question 0.05"]["peak_cross_kv_bytes"] = 2_000
    heads, _, first, *others = table.kept_sets_table(results)
    assert heads == (
        "| K | a kept set for each | right | lost | features kept | peak held | byte-seconds held | bytes read in decoding |"
    )
    assert first == "| 0.05 | question | 80.0 | 1.0 (-0.5 to 2.5) | 30.0 | 2.00 × | 1.00 × | 1.00 × |"
    assert [line.split(" | ")[1] for line in others] == ["image", "question"] * 4 + ["image"]
    assert [line.split(" | ")[0] for line in others[::2]] == [f"| {k}" for k in table.K_RATIOS]


def test_a_stopped_measurement_is_continued_and_another_model_starts_anew(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeAnswerer, "fail_at", "k_ratio=0.15")
    with pytest.raises(KeyboardInterrupt):
        table.main(arguments)
    monkeypatch.setattr(FakeAnswerer, "fail_at", None)
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls[0] == "TrimmedLlama(k_ratio=0.15), pooled tiles, by image, None"
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls == []
    (tmp_path / "photo-model/model.safetensors").write_bytes(b"other weights")
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls[:2] == [f"KeepAll(), {way} tiles, by image, None" for way in ("all", "pooled")]
    assert len(FakeAnswerer.calls) == len(list(table.labels())), "the sets of the other model stay"


def test_a_run_for_some_sets_leaves_the_others_and_their_conditions(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "results/accuracy.json", tmp_path / "results/accuracy.md"
    file.parent.mkdir()
    file.write_text(json.dumps({"measured": {"rows": {"scenes-test": 24}}, "results": {"scenes-test": {}}}))
    assert table.main([*arguments, "--easy-vqa=0", "--photo-scenes=0"]) == 0, "what an older version wrote is not continued"
    before = json.loads(file.read_text())["sets"]
    assert list(before) == ["scenes-test"]
    monkeypatch.setattr(table, "conditions", lambda: {"commit": "another"})
    assert table.main([*arguments, "--scenes=0", "--easy-vqa=0"]) == 0
    after = json.loads(file.read_text())["sets"]
    assert after["scenes-test"] == before["scenes-test"]
    assert after["photo-scenes-test"]["conditions"] == {"commit": "another"}
    assert page.read_text() == table.markdown({"sets": after})
    FakeAnswerer.calls = []
    monkeypatch.setattr(table, "conditions", lambda: {"commit": "a third"})
    assert table.main([*arguments, "--easy-vqa=0"]) == 0
    assert FakeAnswerer.calls == []
    assert page.read_text() == table.markdown({"sets": after})
    monkeypatch.setattr(table, "LIKENESSES", (*table.LIKENESSES, 0.5))
    with pytest.raises(SystemExit):
        table.main([*arguments, "--scenes=0", "--easy-vqa=0"])
    assert "other columns of scenes-test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scenes=-3"], "--scenes -3: give 0 or more"),
        (["--photo-scenes=-1"], "--photo-scenes -1: give 0 or more"),
        (["--easy-vqa=0", "--scenes=0", "--photo-scenes=0"], "nothing to measure"),
        (["--photo-model=nowhere"], "nowhere holds no model"),
    ],
)
def test_bad_options_are_named(arguments: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        table.main([*arguments, *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["chat_template.jinja", "config.json", "model.safetensors"])
def test_another_file_of_the_model_is_another_identity(tmp_path: Path, changed: str) -> None:
    for name in ("chat_template.jinja", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("one")
    before = table.identity(tmp_path, 6)
    (tmp_path / changed).write_text("other")
    assert table.identity(tmp_path, 6) != before


def test_the_code_that_decides_an_answer_is_part_of_the_identity() -> None:
    names = {str(path.relative_to(table.ROOT)) for path in table.code()}
    assert {
        "demo/answerer.py",
        "demo/photographs.py",
        "demo/scenes.py",
        "pipeline/engine.py",
        "pipeline/images.py",
        "pipeline/prompts.py",
        "trimming/engine/prefill.py",
        "trimming/policies/trimmed_llama.py",
        "trimming/selection.py",
    } <= names
    assert not names & {"demo/table.py", "trimming/engine/cuda.py", "trimming/engine/triton_attention.py"}


def committed() -> table.Result:
    return json.loads((RESULTS / "accuracy.json").read_text())


def test_the_committed_results_are_whole_and_their_page_says_the_same() -> None:
    report = committed()
    for name, one in report["sets"].items():
        assert list(one["results"]) == list(table.labels()), f"{name} was measured in other columns: {ANEW}"
    assert {name: one["measured"]["rows"] for name, one in report["sets"].items()} == {
        "easy-vqa-test": EASY_VQA_QUESTIONS["test"],
        "scenes-test": 3_000,
        "photo-scenes-test": 3_000,
    }
    assert (RESULTS / "accuracy.md").read_text() == table.markdown(report), f"accuracy.md is not accuracy.json's: {ANEW}"


def test_the_committed_results_belong_to_the_committed_model_and_code() -> None:
    differ = set()
    for name, one in committed()["sets"].items():
        measured = one["measured"]
        now = table.identity(PHOTO_MODEL if name == "photo-scenes-test" else MODEL, measured["rows"])
        differ |= {key for key in now if measured.get(key) != now[key]}
    assert "model_sha256" not in differ, f"demo/results tells of another model: {ANEW}"
    if differ:
        # Not every change of code changes an answer, so this is no failure.
        pytest.skip(f"demo/results was measured before {', '.join(differ)} changed: {ANEW}")
