"""A job that is hit and started again until it is done: a note of every hit, and the count of what came of it. Linux only."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.soak_job import POLL, Job, files

if TYPE_CHECKING:
    from pipeline.storage import Storage

IN_FLIGHT = 8
"""Units that may be on disk soon after a hit."""

Stage = Literal["starting", "working", "ending"]


@dataclass(frozen=True, slots=True)
class Moment:
    """When a driver is killed: ``seconds`` after so many units are on disk, or after its start where that is 0."""

    stage: Stage
    units: int
    seconds: float


def moments(draw: random.Random, count: int, units: int, start_seconds: float) -> list[Moment]:
    """Moments all over the life of a job of so many units, whose first file comes after ``start_seconds``, in their order.

    Three of ten lie in a start, at random ones; the last one, of three or more, when all units are on disk. Of the others each
    has a part of the work of its own, lest all of it is soon done; what is in flight at the last one is left out.
    """
    ending = int(count > 2)
    starting = count * 3 // 10
    part = max(1.0, units - IN_FLIGHT) / max(1, count - starting - ending)
    working = [1 + int(part * (i + draw.random())) for i in range(count - starting - ending)]
    made = [Moment("working", at, draw.uniform(0, 0.5)) for at in working]
    for _ in range(starting):
        made.insert(draw.randrange(max(1, len(made))), Moment("starting", 0, draw.uniform(0, start_seconds)))
    return made + [Moment("ending", units, draw.uniform(0, 0.5))] * ending


@dataclass(slots=True)
class Soak:
    """A job that is started again until it is done, and the hits that it took."""

    output: Storage
    options: list[str]
    """Of ``jobs.answer``, all but the output."""
    folder: Path
    """For logs."""
    last_hit: float
    """On the monotonic clock: no hit later than this."""
    ends: float
    """A job that still runs then is ended, and fails."""
    hits: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0
    _waiting: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    _seen: int = 0
    _starts: int = 0
    _job: Job | None = None

    def hit_drivers(self, at: Sequence[Moment]) -> None:
        """Kills a driver at each moment, starts the next, and lets the last one end."""
        for moment in at:
            job, began = self._start(), time.monotonic()
            if moment.stage == "starting":
                self._watch(job, until=began + moment.seconds)
            else:
                # Work is what this start has done, however far the ones before it came.
                self._watch(job, units=max(moment.units, self._seen + 1) if moment.stage == "working" else moment.units)
                self._watch(job, until=time.monotonic() + moment.seconds)
            if job.process.poll() is not None or time.monotonic() > self.last_hit:
                # It was done before, or there is no time for more.
                self._finish(job)
                return
            after = time.monotonic() - began
            job.process.send_signal(signal.SIGKILL)
            self._hit("driver", moment.stage, after)
            job.wait()
            self._look()
            # What came between the last look and the kill is no continuation.
            self._seen = len(files(self.output))
        self._finish(self._start())

    def hit_actors(self, at: Sequence[int]) -> None:
        """Kills the actor of one job each time that so many units are on disk."""
        job, began = self._start(), time.monotonic()
        for units in at:
            self._watch(job, units=units)
            # The one before may still be on its way.
            while not (actors := job.actors()) and job.process.poll() is None and time.monotonic() < self.last_hit:
                self._watch(job, until=time.monotonic() + POLL)
            if job.process.poll() is not None or time.monotonic() > self.last_hit:
                break
            os.kill(actors[0], signal.SIGKILL)
            self._hit("actor", "working", time.monotonic() - began)
            self._look()
        self._finish(job)

    def _start(self) -> Job:
        self._starts += 1
        given = ["--output", self.output.url, *self.options]
        log = self.folder / f"log-{self.output.url.rpartition('/')[2]}-{self._starts}"
        self._job = Job(given, Path(self.output.url), log)
        return self._job

    def end(self) -> None:
        """Leaves no job running, whatever happened."""
        if self._job is not None:
            self._job.end()

    def _hit(self, what: str, stage: Stage, after: float) -> None:
        found: dict[str, Any] = {"what": what, "stage": stage, "after_seconds": after, "rows": 0, "continued_seconds": None}
        self.hits.append(found)
        self._waiting.append((found, time.monotonic()))

    def _watch(self, job: Job, *, units: int | None = None, until: float | None = None) -> None:
        """Counts files until so many are there, or it is so late, or the job has ended."""
        until = self.last_hit if until is None else until
        while True:
            count, now = len(files(self.output)), time.monotonic()
            if count > self._seen:
                for hit, since in self._waiting:
                    hit["continued_seconds"] = now - since
                self._waiting.clear()
            self._seen = count
            if (units is not None and count >= units) or job.process.poll() is not None or now >= until:
                return
            time.sleep(max(0.0, min(POLL, until - now)))

    def _look(self) -> None:
        """What the last hit found on disk."""
        self.hits[-1]["rows"], torn = look(self.output)
        self.torn += torn

    def _finish(self, job: Job) -> None:
        self._watch(job, until=self.ends)
        code = job.wait(max(1.0, self.ends - time.monotonic()))
        if code:
            raise RuntimeError(f"exit code {code} instead of 0: {job.said}")
        self.torn += look(self.output)[1]


def look(output: Storage) -> tuple[int, int]:
    """Rows of whole files, and the number of files that are not: unreadable, or without their unit's rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline import record

    fs, rows, torn = output.open()[0], 0, 0
    for name in files(output):
        try:
            found = pq.read_table(output.path(name), filesystem=fs).num_rows
            # Absent where the driver died between a file and its marker.
            with suppress(FileNotFoundError):
                marked = json.loads(output.read(record.marker(name.removesuffix(".parquet"))))["rows"]
                torn += found != marked
            rows += found
        except (pa.ArrowException, OSError, ValueError):
            torn += 1
    return rows, torn


def texts(storage: Storage) -> list[tuple[str, str | None, str | None]]:
    """(id, text, error) of every row of an output folder."""
    import pyarrow.parquet as pq

    fs, path = storage.open()
    table = pq.read_table(path, filesystem=fs, columns=["id", "text", "error"])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def audit(asked: Sequence[str], found: Sequence[tuple[str, str | None, str | None]]) -> dict[str, int]:
    """What became of the ids that were asked."""
    ids = [id for id, *_ in found]
    return {
        "asked": len(asked),
        "written": len(ids),
        "lost": len(set(asked) - set(ids)),
        "doubled": len(ids) - len(set(ids)),
        "errors": sum(error is not None for *_, error in found),
    }
