"""What the processes of a run take of the machine while it lasts. Linux only."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.25
"""Seconds between two looks."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Look:
    """CPU seconds so far."""

    time: float
    """Seconds since the epoch."""
    driver: float
    own: float
    """Of all processes of this one's session, the driver and Ray's."""
    all: float
    """Of the whole machine."""


class Usage:
    """Context in which a thread looks at the CPU time of this session every now and then."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self._seen: dict[tuple[str, str], int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, start: float, end: float) -> Look:
        """What was spent from ``start`` to ``end``, in seconds since the epoch, during the context."""
        first, last = self._at(start), self._at(end)
        return Look(end - start, last.driver - first.driver, last.own - first.own, last.all - first.all)

    def _at(self, moment: float) -> Look:
        """Between two looks as if all ran evenly."""
        place = min(max(bisect_right(self.looks, moment, key=lambda look: look.time), 1), len(self.looks) - 1)
        before, after = self.looks[place - 1], self.looks[place]
        share = (moment - before.time) / (after.time - before.time)

        def part(one: float, other: float) -> float:
            return one + share * (other - one)

        return Look(moment, part(before.driver, after.driver), part(before.own, after.own), part(before.all, after.all))

    def _run(self) -> None:
        while True:
            self.looks.append(look(self._seen))
            if self._stop.wait(EVERY):
                self.looks.append(look(self._seen))
                return


def look(seen: dict[tuple[str, str], int]) -> Look:
    """``seen`` keeps each process's clock ticks by its number and start, so that one that has ended still counts."""
    session = os.getsid(0)
    for folder in Path("/proc").glob("[0-9]*"):
        # It may have ended since. Its name, in brackets, may hold anything.
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                seen[folder.name, fields[19]] = int(fields[11]) + int(fields[12])
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return Look(time.time(), time.process_time(), sum(seen.values()) / _TICKS, (user + nice + system) / _TICKS)


def memory(name: str) -> int:
    """``VmRSS``, the process's memory now, or ``VmHWM``, its most so far, in bytes."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
