"""The repository's tests that need a GPU, run beside the checks in a process of their own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.bench import Bench, Result
from benchmarks.gpu.checks.subject import WrongError, demand

ROOT = Path(__file__).resolve().parents[3]
TESTS_SECONDS = 120.0
"""That the tests may take where the section has no deadline."""
TAIL = 6000
"""Characters of the tests' output that are kept."""


class GpuTests:
    """The repository's tests marked ``gpu``, from the beginning of the with-statement in a process of their own.

    Args:
        bench: for the device and the deadline.
        files: test files to run; default: those that have such tests and import nothing that is missing here.
    """

    def __init__(self, bench: Bench, files: Sequence[Path] | None = None) -> None:
        self.bench = bench
        marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
        self.missing = {path.name: sorted(missing_imports(path)) for path in marked}
        self.files = files or [path for path in marked if not self.missing[path.name]]
        self.folder = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> GpuTests:
        if find_spec("pytest") is None:
            return self
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # These tests compare fp32 with a CPU's.
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
        # transformers before 5.20 warns of its own tower's arguments, and the project's settings make warnings errors.
        options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default::FutureWarning"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={self.report}", *map(str, self.files)]
        with self.output.open("wb") as output:
            # In this program's process group, which the kit ends as a whole.
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    @property
    def report(self) -> Path:
        return Path(self.folder.name) / "report.xml"

    @property
    def output(self) -> Path:
        return Path(self.folder.name) / "output"

    def results(self) -> Result:
        """Waits for the tests. Raises ``WrongError`` where one failed, or where none ran though there is a GPU."""
        if self.process is None:
            return {"skipped": "pytest is not installed"}
        try:
            code: int | None = self.process.wait(max(0.0, min(TESTS_SECONDS, self.bench.deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            code = None
        figures: Result = {"tail": self.output.read_text(errors="replace")[-TAIL:]}
        figures["left_out"] = {name: missing for name, missing in self.missing.items() if missing}
        if self.report.exists():
            figures |= read_report(self.report)
        if code is None and " FAILED" not in figures["tail"]:
            # Their kernels compile anew on every machine; the tail names those that were done.
            return figures | {"skipped": "the tests were not done in time"}
        if code is None:
            raise WrongError("the tests were not done in time, and one had failed", figures)
        # pytest's codes: 0 all passed, 1 some failed, 5 none found, anything else an error of its own.
        faults = [f"{name}: {said}" for name, said in figures.get("failing", {}).items()]
        if code and not faults:
            faults = [f"pytest ended with code {code}"]
        if not faults and not figures["tests_passed"]:
            if self.bench.device.type == "cpu":
                return figures | {"skipped": "there is no CUDA device"}
            faults = ["no test ran"]
        return demand(faults, figures)


def read_report(path: Path) -> Result:
    """Numbers of tests, and what those that failed said, from a JUnit file."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failing = {}
    for case in cases:
        for problem in (*case.iter("failure"), *case.iter("error")):
            name = "::".join(filter(None, [case.get("classname", "").rsplit(".", 1)[-1], case.get("name")]))
            failing[name] = (problem.get("message") or "").split("\n", 1)[0]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "tests_passed": len(cases) - skipped - len(failing),
        "tests_failed": len(failing),
        "tests_skipped": skipped,
        "failing": failing,
    }


def missing_imports(path: Path, seen: set[Path] | None = None) -> set[str]:
    """Packages that a file, or a module of this repository that it imports, imports at its top and that are not installed."""
    seen = set() if seen is None else seen
    seen.add(path)
    missing: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # What is imported from a package may be a module of it.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            own = _own_files(name, path.parent)
            if own:
                missing |= {each for file in own - seen for each in missing_imports(file, seen)}
            elif find_spec(name.split(".")[0]) is None:
                missing.add(name.split(".")[0])
    return missing


def _own_files(name: str, folder: Path) -> set[Path]:
    """The files of this repository that importing ``name`` runs."""
    found = set()
    for base in (ROOT, folder):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            place = base.joinpath(*parts[:end])
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found
