"""How far a run is: actors report rows to a counter on the cluster, the driver shows it on a terminal or as log lines."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

import ray


class Counter:
    """Rows and errors so far; runs as a Ray actor. Redone work counts twice, so this informs and decides nothing."""

    def __init__(self) -> None:
        self.rows = self.errors = 0

    def add(self, rows: int, errors: int) -> None:
        self.rows += rows
        self.errors += errors

    def read(self) -> tuple[int, int]:
        return self.rows, self.errors


class Report:
    """What an actor calls; never waits for the counter and never fails for it."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter

    def __call__(self, rows: int, errors: int) -> None:
        self.counter.add.remote(rows, errors)


class Meter:
    """Puts progress into words.

    Args:
        total: rows of the run.
        done: rows that an earlier start has finished.
        began: when this start began, in seconds of any clock.
    """

    def __init__(self, total: int, done: int, began: float) -> None:
        self.total, self.done, self.began = total, done, began
        self._first: tuple[float, int] | None = None

    def line(self, rows: int, errors: int, now: float) -> str:
        """E.g. ``1,024 of 2,000 rows, 31.5 rows/s, 0:31 left, 2 errors``; ``rows`` are those of this start."""
        if rows == 0:
            return f"starting: {now - self.began:.0f} s"
        # The rate leaves out the start of Ray and the loading of the model, which would spoil the estimate.
        self._first = self._first or (now, rows)
        since, at_first = self._first
        done = min(self.total, self.done + rows)
        parts = [f"{done:,} of {self.total:,} rows"]
        if rows > at_first and now > since:
            rate = (rows - at_first) / (now - since)
            minutes, seconds = divmod(round((self.total - done) / rate), 60)
            hours, minutes = divmod(minutes, 60)
            left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
            parts += [f"{rate:.1f} rows/s", f"{left} left"]
        parts.append(f"{errors} error{'' if errors == 1 else 's'}")
        return ", ".join(parts)


class Progress:
    """Context in which a thread of the driver shows rows done, rate, time left and errors.

    Args:
        total: rows of the run.
        done: rows that an earlier start has finished.
        stream: where to; a terminal has one line that changes, anything else a line every ten seconds.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None = None) -> None:
        self.meter = Meter(total, done, time.monotonic())
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.counter: Any = ray.remote(num_cpus=0)(Counter).remote()
        self.report = Report(self.counter)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _run(self) -> None:
        while not self._stop.wait(0.5 if self.live else 10.0):
            try:
                rows, errors = ray.get(self.counter.read.remote(), timeout=5)
            except Exception:  # noqa: BLE001 - a display that fails must not end a run
                continue
            self._show(self.meter.line(rows, errors, time.monotonic()))

    def _show(self, line: str) -> None:
        self.stream.write(f"\r\x1b[K{line}" if self.live else f"{line}\n")
        self.stream.flush()
