"""The GPU kit: rehearsed whole on a CPU without what the lent machine lacks, and what it makes of sections that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_kit
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.amounts import SECTIONS
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.correct import CHECKS, GPU_TESTS
from benchmarks.gpu.store import Store
from benchmarks.gpu.tower import WAYS

ROOT = Path(__file__).resolve().parent.parent
LACKING = ("ray", "s3fs", "jsonargparse", "tenacity", "rapidfuzz", "moto", "duckdb", "datasets", "easy_vqa", "boto3")
TINY = ["--device", "cpu", "--size", "tiny"]

BLOCKER = f"""
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: the lent machine lacks it", name=name)

sys.meta_path.insert(0, Lacking())
"""


@pytest.fixture(autouse=True)
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program sets it for itself, where there is no GPU: here that must end with the test."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


# ---- all of it --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rehearsal_runs_every_section_without_what_the_machine_lacks(tmp_path: Path) -> None:
    """In a plain checkout, by PYTHONPATH alone; processes that the kit starts lack the same."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import ray"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "the lent machine lacks it" in done.stderr
    output = tmp_path / "out"
    # Some forty seconds where nothing runs beside it; what does must not cut a section short.
    sections = ["--sections", ",".join(f"{name}=100" for name in SECTIONS)]
    command = [sys.executable, "-m", "benchmarks.gpu_kit", *TINY, "--output", str(output), *sections]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((output / "gpu.json").read_text())
    assert list(found["sections"]) == list(SECTIONS)
    assert {name: part["status"] for name, part in found["sections"].items()} == dict.fromkeys(SECTIONS, "done")
    assert found["rehearsal"] is True
    assert found["conditions"]["size"] == "tiny"
    check_correct(found["sections"]["correct"])
    ratios = found["ratios"]
    assert ratios["captioning_engine_over_peer"] > 0
    assert list(ratios["decode_roofline_share"]) == ["full", "half", "quarter"]
    assert {tiles: set(modes) for tiles, modes in ratios["tower_roofline_share"].items()} == {
        "1": set(WAYS),
        "2": set(WAYS),
        "4": WAYS.keys() - {"real"},
    }
    page = (output / "gpu.md").read_text()
    assert page in done.stdout
    assert "This is a rehearsal on a tiny model" in page
    assert "cannot be made" not in page
    for said in (
        "## Correct",
        "## The demo's answers",
        "| 2 | real |",
        "images of four tiles come from the host in",
        "| half | 3 |",
        "| quarter | 4 |",
        "| peer |",
        "rows' GB",
    ):
        assert said in page
    # What comes back from a lent machine is few files, none in deep folders.
    assert sorted(path.name for path in output.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]


def check_correct(section: dict[str, Any]) -> None:
    """Every check has passed. The tests marked gpu find no device, which is no failure."""
    checks = section["checks"]
    assert list(checks) == [*CHECKS, GPU_TESTS]
    assert section["not_reached"] == []
    assert {name for name, check in checks.items() if not check["passed"]} == {GPU_TESTS}
    tests, policies, memory = checks[GPU_TESTS], checks["policies"], checks["out of memory"]
    assert tests["skipped"] == "there is no CUDA device"
    assert (tests["tests_passed"], tests["tests_failed"], tests["left_out"]) == (0, 0, {})
    assert tests["tests_skipped"] > 30
    assert (policies["policies"], policies["kept_equal"], policies["different"]) == (15, 1, {})
    assert memory["cases"] == memory["survived"] == 8


def test_help_needs_nothing_heavy() -> None:
    for module in ("benchmarks.gpu_kit", "benchmarks.gpu.__main__"):
        heavy = f"import {module}, sys; print({{'torch', 'ray', 'transformers', 'numpy'}} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


def test_no_section_pulls_in_what_the_machine_lacks() -> None:
    modules = ", ".join(f"benchmarks.gpu.{name}" for name in SECTIONS)
    needed = f"import {modules}, benchmarks.gpu.conditions, sys; print({set(LACKING)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", needed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the command line -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [gpu_kit.main, program.main])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "--size tiny"),
        (["--only", "tower,towel"], "'towel' is no section"),
        (["--sections", "tower=soon"], "tower=soon: give a positive number"),
        (["--minutes", "0"], "must be positive"),
    ],
)
def test_what_is_refused(
    main: Callable[[list[str]], int], arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--output", str(tmp_path)])
    assert refused.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_replaces_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Store(tmp_path)
    measured.rehearsal = False
    measured.sections = {"tower": {"status": "done", "began": 1.0, "took": 1.0, "conditions": conditions()}}
    measured.conditions = conditions()
    measured.save()
    before = (tmp_path / "gpu.json").read_bytes()
    with pytest.raises(SystemExit) as refused:
        gpu_kit.main([*TINY, "--output", str(tmp_path)])
    assert refused.value.code == 2
    assert "rehearse elsewhere" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_bytes() == before


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu.json").write_text('{"captioning": {}}')
    with pytest.raises(SystemExit) as refused:
        gpu_kit.main([*TINY, "--output", str(tmp_path)])
    assert refused.value.code == 2
    assert "move it away" in capsys.readouterr().err


def test_without_a_gpu_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    output = tmp_path / "results"
    assert program.main(["--output", str(output)]) == 0
    assert capsys.readouterr() == ("no CUDA device: the GPU benchmark was skipped\n", "")
    assert not output.exists()
    assert gpu_kit.main(["--output", str(output)]) == 0
    assert capsys.readouterr().out == "no CUDA device: the GPU kit was skipped\n"
    assert not (output / "gpu.json").exists()


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import conditions as of

    monkeypatch.setattr(of, "_git", lambda *_: "unknown")
    assert of.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "64d9bcd")
    assert of.commit() == "64d9bcd"


# ---- sections in one process ------------------------------------------------------------------------------------------------


def test_a_failed_section_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench, out: dict[str, Any]) -> None:
        out["tiles"] = {"1": {}}
        raise RuntimeError("out of order")

    monkeypatch.setattr("benchmarks.gpu.tower.measure_tower", fail)
    assert program.main([*TINY, "--output", str(tmp_path), "--only", "roofline,tower,questions"]) == 1
    store = Store(tmp_path)
    assert {name: part["status"] for name, part in store.sections.items()} == {
        "roofline": "done",
        "tower": "failed",
        "questions": "done",
    }
    tower = store.sections["tower"]
    assert tower["error"] == "RuntimeError: out of order"
    assert "in fail" in tower["traceback"]
    assert tower["tiles"] == {"1": {}}
    page = (tmp_path / "gpu.md").read_text()
    assert "| tower | failed | 0 | RuntimeError: out of order |" in page
    assert "| decode | not reached |" in page


def test_only_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, bench: Bench, store: Store, here: dict[str, Any], *_: float) -> bool:
        ran.append(name)
        status = "failed" if name == "decode" and ran.count("decode") == 1 else "done"
        store.sections[name] = {
            "status": status,
            "began": time.time(),
            "took": 0.0,
            "conditions": here,
            "times": ran.count(name),
        }
        store.save()
        return status == "done"

    def main(*flags: str) -> list[str]:
        ran.clear()
        program.main([*TINY, "--output", str(tmp_path), *flags])
        return list(ran)

    monkeypatch.setattr(program, "run", run)
    assert main("--only", "decode,roofline,tower") == ["roofline", "tower", "decode"]
    first = Store(tmp_path).sections["tower"]
    # What failed and what is missing; the rest stays.
    assert main("--resume") == [name for name in SECTIONS if name not in ("roofline", "tower")]
    assert main("--resume", "--only", "tower,decode") == ["decode"]
    assert Store(tmp_path).sections["tower"] == first
    assert main("--only", "tower") == ["tower"]
    assert set(Store(tmp_path).sections) == set(SECTIONS)
    assert main() == list(SECTIONS)


def test_no_section_begins_after_the_end(tmp_path: Path) -> None:
    assert program.main([*TINY, "--output", str(tmp_path), "--minutes", "0.00001"]) == 0
    assert Store(tmp_path).sections == {}


# ---- the kit over a program that misbehaves ---------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    names = ("commit", "hardware", "cores", "torch", "cuda", "triton", "transformers", "python", "seed", "memory_bytes")
    return dict.fromkeys(names, 0)


MISBEHAVING = """
import os, signal, subprocess, sys, time
from pathlib import Path
now, shift = time.time, float(os.environ.get("SHIFT", 0))
time.time = lambda: now() + shift
from benchmarks.gpu.options import parse

options = parse("", sys.argv[1:])
store = options.store
store.conditions = here = {conditions}
store.save()
for name in options.sections:
    print("begin", name, file=sys.stderr, flush=True)
    store.sections[name] = out = {{"status": "running", "began": time.time(), "conditions": here, "tiles": {{}}}}
    store.save()
    if name in {hang}:
        Path({folder!r}, "child").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        time.sleep(600)
    if name in {die}:
        os.kill(os.getpid(), signal.SIGSEGV)
    out |= {{"status": "failed" if name in {fail} else "done", "took": 0.0}}
    store.save()
    if name in {leave}:
        sys.exit(1)
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the kit over a real process whose sections do as they are told: (exit code, sections)."""

    def run(*flags: str, minutes: float = 1.0, **behaviour: Sequence[str]) -> tuple[int, dict[str, Any]]:
        told = {name: tuple(behaviour.get(name, ())) for name in ("hang", "die", "fail", "leave")}
        script = tmp_path / "program.py"
        script.write_text(MISBEHAVING.format(conditions=conditions(), folder=str(tmp_path), **told))
        command = gpu_kit._command
        monkeypatch.setattr(gpu_kit, "_command", lambda *given: [sys.executable, str(script), *command(*given)[3:]])
        monkeypatch.setattr(gpu_kit, "GRACE", 1.0)
        try:
            sections = ["--sections", ",".join(f"{name}=0.5" for name in SECTIONS)]
            code = gpu_kit.main([*TINY, "--output", str(tmp_path / "out"), "--minutes", str(minutes), *sections, *flags])
        finally:
            monkeypatch.setattr(gpu_kit, "_command", command)
        return code, Store(tmp_path / "out").sections

    return run


def ends(sections: dict[str, Any]) -> dict[str, str]:
    return {name: part["status"] for name, part in sections.items()}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is none, until its parent looks.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_section_that_hangs_is_ended_with_all_it_started(kit: Any, tmp_path: Path) -> None:
    code, sections = kit(hang=["tower"])
    assert code == 1
    assert ends(sections) == {**dict.fromkeys(SECTIONS, "done"), "tower": "timed out"}
    assert sections["tower"]["error"] == "it took over 2 s"
    assert sections["tower"]["tiles"] == {}
    assert not alive(int((tmp_path / "child").read_text()))
    assert "| tower | timed out |" in (tmp_path / "out/gpu.md").read_text()


def test_a_process_that_dies_costs_its_section_alone(kit: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, sections = kit(die=["correct", "decode"], fail=["prefill"], leave=["prefill"])
    assert code == 1
    assert ends(sections) == {
        **dict.fromkeys(SECTIONS, "done"),
        "correct": "killed",
        "prefill": "failed",
        "decode": "killed",
    }
    assert sections["decode"]["error"] == f"its process ended with signal {signal.SIGSEGV.value}"
    said = capfd.readouterr().err
    # Each is begun once, in order: what was tried is not tried again.
    assert [line.split()[1] for line in said.splitlines() if line.startswith("begin")] == list(SECTIONS)
    assert "begin questions\n" in (tmp_path / "out/gpu.log").read_text()
    # The same again takes up what did not end well.
    code, sections = kit("--resume")
    assert code == 0
    assert ends(sections) == dict.fromkeys(SECTIONS, "done")
    again = [line.split()[1] for line in capfd.readouterr().err.splitlines() if line.startswith("begin")]
    assert again == ["correct", "prefill", "decode"]


@pytest.mark.parametrize("into", [10_000, 60_000])
def test_points_in_time_are_kept_whole(into: int, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to five digits as figures are, they would lie hours from now: before the start or after it."""
    now = time.time
    shift = into - now() % 100_000
    monkeypatch.setattr(time, "time", lambda: now() + shift)
    monkeypatch.setenv("SHIFT", str(shift))
    code, sections = kit(hang=["tower"])
    assert code == 1
    assert ends(sections) == {**dict.fromkeys(SECTIONS, "done"), "tower": "timed out"}


def test_what_an_earlier_kit_was_in_the_midst_of_is_taken_up(kit: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.conditions = conditions()
    store.sections = {"tower": {"status": "running", "began": time.time() - 60, "conditions": conditions()}}
    store.save()
    code, sections = kit("--resume")
    assert code == 0
    assert ends(sections) == dict.fromkeys(SECTIONS, "done")


def test_the_kits_time_ends_what_runs(kit: Any) -> None:
    began = time.monotonic()
    code, sections = kit(minutes=0.02, hang=["answers"])
    assert code == 1
    assert time.monotonic() - began < 10
    assert ends(sections) == {"correct": "done", "answers": "timed out"}
    assert sections["answers"]["error"] == "the kit's time was over"


def test_a_program_that_cannot_start_is_said(kit: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_kit, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no torch')"])
    assert gpu_kit.main([*TINY, "--output", str(tmp_path / "out")]) == 1
    assert "before it began a section" in capsys.readouterr().err


def test_stopping_the_kit_stops_its_program(tmp_path: Path) -> None:
    """SIGTERM, as a time limit sends it."""
    output = tmp_path / "out"
    kit = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_kit", *TINY, "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        time.sleep(0.05)
        if (output / "gpu.json").exists():
            break
    children = Path(f"/proc/{kit.pid}/task/{kit.pid}/children").read_text().split()
    assert children
    kit.send_signal(signal.SIGTERM)
    assert kit.wait(20) == 128 + signal.SIGTERM
    assert not any(alive(int(child)) for child in children)
    # Whatever it was doing, the file is whole.
    assert json.loads((output / "gpu.json").read_text())["rehearsal"] is True
