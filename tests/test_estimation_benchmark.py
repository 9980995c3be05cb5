"""The model held against ``make bench``: the committed page is what the code makes of the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import estimate
from benchmarks.estimate import GOAL, cpu_runs, gpu_runs, markdown, result
from jobs.report import STAGES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def cpu() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text())
    return found


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any] | None:
    path = RESULTS / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def found(cpu: dict[str, Any], gpu: dict[str, Any] | None) -> dict[str, Any]:
    return result(cpu, gpu)


def test_the_committed_files_are_what_the_code_computes(found: dict[str, Any]) -> None:
    assert json.loads((RESULTS / "estimate.json").read_text()) == json.loads(json.dumps(found))
    assert (RESULTS / "estimate.md").read_text() == markdown(found)


def test_every_stage_of_every_predicted_run_is_within_the_goal(found: dict[str, Any]) -> None:
    assert len(found["predicted"]) == 17
    for name, run in found["predicted"].items():
        for stage in STAGES:
            assert abs(run["stages"][stage]["error"]) < GOAL, (name, stage)
        assert abs(run["together"]["error"]) < GOAL, name


def test_the_run_that_calibrates_is_not_among_those_predicted(found: dict[str, Any]) -> None:
    assert found["calibration"] not in found["predicted"]
    assert found["calibration"] not in found["calibrated_elsewhere"]


def test_nothing_predicted_is_fitted_to(cpu: dict[str, Any], found: dict[str, Any]) -> None:
    """Other measurements of the predicted runs leave the predictions as they are."""
    other = json.loads(json.dumps(cpu))
    for workload in ("captioning", "questions", "four_tiles"):
        for name, contender in other[workload]["contenders"].items():
            if f"{workload}, {name}" in found["predicted"]:
                for stage in STAGES:
                    contender[f"{stage}_seconds"] *= 3
    for name, run in result(other, None)["predicted"].items():
        for stage in STAGES:
            was = found["predicted"][name]["stages"][stage]
            assert run["stages"][stage]["predicted"] == was["predicted"]
            assert run["stages"][stage]["measured"] == pytest.approx(3 * was["measured"], rel=1e-4)


def test_the_schedule_makes_the_steps_that_were_counted(found: dict[str, Any]) -> None:
    for name, run in found["predicted"].items():
        # The engine counts rows of one token too, which their prefill ends.
        assert run["peak_sequences"]["predicted"] == pytest.approx(run["peak_sequences"]["measured"], rel=0.02), name
        assert run["decode_steps"]["predicted"] == pytest.approx(run["decode_steps"]["measured"], rel=0.1), name


def test_the_cost_model_predicts_what_was_held(found: dict[str, Any]) -> None:
    for name, run in found["predicted"].items():
        held = run["peak_cross_kv_megabytes"]
        assert held["predicted"] == pytest.approx(held["measured"], rel=0.15), name


def test_a_benchmark_that_has_changed_is_refused(cpu: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"output tokens in cpu\.json"):
        cpu_runs({**cpu, "captioning": {**cpu["captioning"], "output_tokens": 1}})
    with pytest.raises(ValueError, match="no model of the benchmarks"):
        cpu_runs({**cpu, "conditions": {**cpu["conditions"], "model": {"hidden": 1, "layers": 1}}})


def test_a_gpus_table_is_taken_as_soon_as_there_is_one(cpu: dict[str, Any]) -> None:
    """Of the form that ``benchmarks.gpu`` writes; its seconds are a model's own, slowed down, so that the error is known."""
    conditions = {"model": {"hidden": 4096, "layers": 40}, "seed": 0, "hardware": "NVIDIA H200"}
    counted = {"decode_steps": 95, "peak_sequences": 24, "peak_cross_kv_bytes": 1e9}
    contenders = {
        name: {**{f"{stage}_seconds": 1.0 for stage in STAGES}, "keep_fraction": keep, **counted}
        for name, keep in (("engine", 1.0), ("engine, trimmed", 0.5))
    }
    captioning = {"status": "done", "images": 24, "contenders": contenders}
    gpu = {"rehearsal": False, "conditions": conditions, "sections": {"captioning": captioning}}
    runs = gpu_runs(gpu)
    assert [run.name for run in runs] == ["captioning, engine", "captioning, engine, trimmed"]
    from jobs.estimation.machine import roofline

    true = roofline("it", 989.5e12, 4.8e12, {"tower": 0.5, "prefill": 0.4, "decode": 0.6})
    for run, contender in zip(runs, contenders.values(), strict=True):
        for stage, time in true.by_stage(run.calls).items():
            contender[f"{stage}_seconds"] = time.seconds
    contenders["engine, trimmed"]["decode_seconds"] *= 1.25
    made = result(cpu, gpu)
    assert made["gpu"]["roofline_shares"] == pytest.approx({"tower": 0.5, "prefill": 0.4, "decode": 0.6})
    stages = made["gpu"]["predicted"]["captioning, engine, trimmed"]["stages"]
    assert [stages[stage]["error"] for stage in STAGES] == pytest.approx([0, 0, -0.2], abs=1e-3)
    assert "On NVIDIA H200, calibrated on one run (captioning, engine)" in markdown(made)
    # A rehearsal measured nothing, and of a card that the table lacks the peaks are not known.
    assert result(cpu, gpu | {"rehearsal": True})["gpu"] is None
    conditions["hardware"] = "NVIDIA Abacus"
    assert result(cpu, gpu)["gpu"]["predicted"] == {}


@pytest.mark.parametrize("captioning", [{}, {"captioning": {"status": "failed", "error": "it"}}])
def test_a_gpu_table_without_captions_predicts_nothing(cpu: dict[str, Any], captioning: dict[str, Any]) -> None:
    conditions = {"model": {"hidden": 4096, "layers": 40}, "seed": 0, "hardware": "NVIDIA H200"}
    found = result(cpu, {"rehearsal": False, "conditions": conditions, "sections": captioning})
    assert found["gpu"] == {"hardware": "NVIDIA H200", "predicted": {}}
    assert "On NVIDIA H200 nothing is predicted" in markdown(found)


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cpu.json").write_text((RESULTS / "cpu.json").read_text())
    assert estimate.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "estimate.md").read_text() == capsys.readouterr().out.removesuffix("\n")
    assert json.loads((tmp_path / "estimate.json").read_text())["goal"] == GOAL
