"""The section "correct": whether the engine is right on this device, before anything is timed.

Checks run one after the other in order of their worth, fp32 without TF32, and a failed one costs no other. The tests that need
a GPU run beside them in a process of their own.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench, Result, SectionError, without_tf32
from benchmarks.gpu.checks.captured import check_captured
from benchmarks.gpu.checks.gpu_tests import GpuTests
from benchmarks.gpu.checks.memory import check_out_of_memory
from benchmarks.gpu.checks.references import check_logits, check_masked, check_policies, check_tokens, check_tower
from benchmarks.gpu.checks.subject import Subject, WrongError

Check = Callable[[Subject], Result]

CHECKS: dict[str, tuple[float, Check]] = {
    "tokens": (8, check_tokens),
    "captured": (10, check_captured),
    "logits": (4, check_logits),
    "masked": (4, check_masked),
    "tower": (4, check_tower),
    "out of memory": (6, check_out_of_memory),
    "policies": (10, check_policies),
}
"""In order of their worth, with the seconds that each is taken to need."""
GPU_TESTS = "gpu tests"


def measure_correct(bench: Bench, out: Result) -> None:
    """Fills ``out`` and raises ``SectionError`` where a check failed.

    - ``checks``: by name, each with

      - ``passed``: True, False, or None where the check was skipped.
      - ``seconds``: that it took.
      - ``skipped``: why, where it was.
      - ``error``, ``traceback``: in one line and in full, where it failed; ``faults`` lists all that it found wrong.
      - its own figures, by the check's own names.

    - ``not_reached``: the names of checks that the section had no time for.

    After a failure that leaves the device broken the failure itself is raised at once, as every later call would fail too.
    """
    names = [*CHECKS, GPU_TESTS]
    out.update(checks={}, not_reached=names)
    subject = Subject(bench)
    with GpuTests(bench) as tests, without_tf32():
        checks = CHECKS | {GPU_TESTS: (1, lambda subject: tests.results())}
        for name in list(names):
            seconds, check = checks[name]
            if not bench.has(seconds):
                bench.say(f"correct: {name}: no time")
                continue
            names.remove(name)
            _run(bench, out["checks"], name, check, subject)
    failed = [name for name, check in out["checks"].items() if check["passed"] is False]
    if failed:
        raise SectionError(f"{', '.join(failed)}: {out['checks'][failed[0]]['error']}")


def _run(bench: Bench, checks: Result, name: str, check: Check, subject: Subject) -> None:
    """Runs one check and keeps what it found, whatever happens."""
    began = time.monotonic()
    found: Result = {"passed": False, "seconds": 0.0}
    try:
        figures = check(subject)
        found |= {"passed": None if "skipped" in figures else True} | figures
        broken = None
    except Exception as error:  # noqa: BLE001 - a machine is lent seldom: one check's failure must not cost the others
        first_line = " ".join(str(error).split("\n", 1)[0].split())
        found |= error.figures if isinstance(error, WrongError) else {}
        found |= {"error": f"{type(error).__name__}: {first_line}", "traceback": traceback.format_exc()}
        # Its frames hold the check's tensors.
        traceback.clear_frames(error.__traceback__)
        broken = None if works(bench.device) else error
    found["seconds"] = time.monotonic() - began
    checks[name] = found
    bench.save()
    bench.say(f"correct: {name}: {_said(found)}, {found['seconds']:.1f} s")
    if broken is not None:
        raise broken
    bench.release()


def _said(found: Result) -> str:
    if found["passed"] is None:
        return f"skipped, as {found['skipped']}"
    return "passed" if found["passed"] else f"failed: {found['error']}"


def works(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access, say, CUDA fails every later call of the process."""
    try:
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
