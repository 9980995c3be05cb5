"""The measured table: its columns, its controls, its page, and that it continues where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo import answerer, table
from demo.shards import Row
from trimming import Grid, KeepAll, Policy, Random, TrimmedLlama


class FakeAnswerer:
    """Answers color questions rightly and others wrongly, and keeps half unless told to keep all."""

    calls: list[str]
    fail_at: str | None = None

    def __init__(self, _: Path) -> None:
        FakeAnswerer.calls = []

    def answer(self, rows: list[Row], policy: Policy) -> list[Any]:
        FakeAnswerer.calls.append(repr(policy))
        if FakeAnswerer.fail_at and FakeAnswerer.fail_at in repr(policy):
            raise KeyboardInterrupt
        kept = 64 if isinstance(policy, KeepAll) else 32
        trim = answerer.SampleTrim(
            visual_tokens=64,
            kept_visual_tokens=kept,
            kept=None,  # type: ignore[arg-type]
            cross_kv_bytes_full=64,
            cross_kv_bytes=kept,
            cross_kv_bytes_allocated=64,
            self_kv_bytes=1,
        )
        return [answerer.Answered(row, row.answer if row.kind == "color" else "no such answer", trim) for row in rows]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(answerer, "Answerer", FakeAnswerer)
    monkeypatch.setattr(FakeAnswerer, "fail_at", None)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return ["--model", str(tmp_path), "--output", str(tmp_path / "results"), "--easy-vqa", "50", "--scenes", "4"]


def test_columns_are_full_then_each_k_with_its_controls() -> None:
    assert list(table.labels())[:5] == ["full", "trimmed-llama 0.25", "random 0.25", "grid 0.25", "trimmed-llama 0.15"]
    assert len(list(table.labels())) == 10


def test_controls_take_the_kept_fraction_that_was_measured() -> None:
    results = {"trimmed-llama 0.15": {"keep_fraction": 0.4567}}
    assert isinstance(table.policy_of("full", results), KeepAll)
    assert table.policy_of("trimmed-llama 0.15", results) == TrimmedLlama(k_ratio=0.15)
    assert table.policy_of("random 0.15", results) == Random(keep=0.4567)
    assert table.policy_of("grid 0.15", results) == Grid(keep=0.4567)


def test_report_and_page(arguments: list[str], tmp_path: Path) -> None:
    assert table.main(arguments) == 0
    report = json.loads((tmp_path / "results/accuracy.json").read_text())
    assert set(report["results"]) == {"easy-vqa-test", "scenes-test"}
    scenes = report["results"]["scenes-test"]
    assert list(scenes) == list(table.labels())
    assert scenes["full"]["kinds"]["color"] == {"rows": 4, "right": 4}
    assert scenes["full"]["rows"] == 24
    assert scenes["full"]["accuracy"] == round(1 / 6, 4)
    assert scenes["random 0.05"]["policy"] == "Random(keep=0.5, seed=0)"
    assert report["conditions"]["dtype"] == "float32"
    page = (tmp_path / "results/accuracy.md").read_text()
    assert "| color | 4 | 100.0 |" in page
    assert "| all but captions | 20 | 20.0 |" in page
    assert "| features kept |  | 100.0 | 50.0 |" in page
    assert "- full: caption 0.0, count 0.0, letter 0.0, position 0.0, shape 0.0" in page


def test_a_stopped_measurement_is_continued_and_another_model_starts_anew(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeAnswerer, "fail_at", "k_ratio=0.15")
    with pytest.raises(KeyboardInterrupt):
        table.main(arguments)
    monkeypatch.setattr(FakeAnswerer, "fail_at", None)
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls[0] == "TrimmedLlama(k_ratio=0.15)"
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls == []
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert table.main(arguments) == 0
    assert FakeAnswerer.calls[0] == "KeepAll()"
