"""A whole job in processes of its own, to be hit from outside. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.conditions import ROOT

if TYPE_CHECKING:
    from pipeline.storage import Storage

POLL = 0.1


class Job:
    """``jobs.answer`` in a process group of its own, with a Ray of its own unless ``--ray-address`` is given.

    ``before`` goes before the command and has to end by executing it, so that the process is the driver's.
    """

    def __init__(
        self, options: Sequence[str], output: Path, log: Path, *, before: Sequence[str] = (), **environment: str
    ) -> None:
        self.output, self.log = output, log
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "jobs.answer", *options],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """Both streams so far."""
        return self.log.read_text()

    def wait(self, seconds: float = 180) -> int:
        """The exit code; whatever the job leaves behind is ended."""
        try:
            return self.process.wait(seconds)
        finally:
            self.end()

    def end(self) -> None:
        """Kills all that is left of it: what a killed driver leaves behind is in its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_files(self, count: int, output: Storage | None = None, seconds: float = 90) -> None:
        """Until ``output``, by default the job's folder, has so many files. Raises ``RuntimeError`` with what the job said."""
        from pipeline.storage import Storage

        output, ends = output or Storage(str(self.output)), time.monotonic() + seconds
        while len(files(output)) < count:
            if self.process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{count} files never came: {self.said}")
            time.sleep(POLL)

    def actors(self) -> list[int]:
        """Processes of the job's actors that hold the model, where Ray is its own."""
        return [pid for pid in actors() if os.getsid(pid) == self.process.pid]


def files(output: Storage) -> list[str]:
    """Names of the units' files that are there."""
    return [name for name in output.names() if name.endswith(".parquet")]


def actors() -> list[int]:
    """Processes of all actors of this machine that hold a model."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # It may have ended since.
        with suppress(OSError):
            if "ray::MapWorker" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found
