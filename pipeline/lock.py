"""One run a folder at a time: a lock on the output folder, which the driver holds while it writes there.

On a local filesystem the kernel holds the lock and lets go of it when the driver dies. An object store knows no such thing:
there the lock is an object that its holder renews. Whoever finds it watches it: one that changes is held, one that stands still
for ``LEASE`` seconds belongs to a run that was killed. Watching, rather than comparing times, needs no clocks that agree.

A second writer could lose nothing (a unit's file is written whole, and the same by whoever writes it), but would do all the
work again.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import one_line
from pipeline.record import HOLDER, LOCK, UNFINISHED, RefusalError
from pipeline.retries import transient
from pipeline.storage import Storage

LEASE = 45.0
"""Seconds without a renewal after which a lock is nobody's."""
RENEWAL = 10.0
POLL = 2.0
SETTLE = 1.0
"""Seconds after which the last of several that take a lock at once can be told."""


class LostError(RuntimeError):
    """Another run has taken the lock over, as nothing was heard of this one for too long."""


@contextmanager
def locked(output: Storage, say: Callable[[str], object] = lambda line: None, part: str = "") -> Iterator[None]:
    """Holds the lock of ``output``, or of a partition of the run there (``record.part``).

    Raises ``RefusalError`` where another run holds it, or nothing can be written there; ``LostError`` where it is taken away.
    ``say`` takes a line where there is something to wait for.
    """
    place = _Place(output, part)
    with _local(place) if output.local else _leased(place, say):
        yield


@contextmanager
def refusing(output: Storage) -> Iterator[None]:
    """Around what is read and written before a run begins: what fails, and will not pass by itself, is a ``RefusalError``."""
    try:
        yield
    except RefusalError:
        raise
    except Exception as error:
        if transient(error):
            raise
        remedy = "name a folder that can be written, or mend this one"
        if isinstance(error, UnicodeError):
            remedy = "set PYTHONUTF8=1 (or a UTF-8 locale, as LC_ALL=C.UTF-8), or name another folder"
        raise RefusalError(f"output={output.url!r} can't be used: {one_line(error)}; {remedy}") from error


class _Place:
    """Where the lock is, and who holds it."""

    def __init__(self, output: Storage, part: str) -> None:
        self.output, self.lock, self.holder = output, LOCK.format(part=part), HOLDER.format(part=part)
        self.temporary = UNFINISHED.format(part=part)

    def read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.output.read(self.holder))
        except FileNotFoundError:
            return None
        except ValueError:
            # Somebody's, whoever that is.
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, holder: dict[str, Any]) -> None:
        self.output.write(self.holder, json.dumps(holder).encode(), temporary=self.temporary)

    def held(self, holder: dict[str, Any] | None) -> RefusalError:
        return RefusalError(
            f"output={self.output.url!r} is being written by {_described(holder or {})}; wait for it, or stop it, or choose "
            "another folder"
        )


@contextmanager
def _local(place: _Place) -> Iterator[None]:
    lock, fresh = FileLock(place.output.path(place.lock)), _missing(place.output.open()[1])
    try:
        with refusing(place.output):
            _take(lock, place)
        yield
    finally:
        # Not where another run holds it.
        if lock.is_locked:
            place.output.remove(place.holder)
            lock.release()
            _tidy(place, fresh)
        else:
            _remove_empty(fresh)


def _take(lock: FileLock, place: _Place) -> None:
    os.makedirs(os.path.dirname(lock.lock_file), exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise place.held(place.read()) from None
    place.write(_holder())


def _missing(folder: str) -> list[str]:
    """``folder`` and those above it that are not there, the innermost first."""
    missing = []
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _remove_empty(folders: list[str]) -> None:
    for folder in folders:
        with suppress(OSError, ValueError):
            os.rmdir(folder)


def _tidy(place: _Place, fresh: list[str]) -> None:
    """Leaves nothing of a run that was refused before it wrote anything; ``fresh`` are folders that it has made."""
    run = os.path.dirname(place.output.path(place.lock))
    left = {
        name for folder in (run, place.output.path(place.temporary)) if os.path.isdir(folder) for name in os.listdir(folder)
    }
    if left <= {os.path.basename(place.lock), os.path.basename(place.temporary)}:
        place.output.remove(place.lock)
        _remove_empty([place.output.path(place.temporary), run, *fresh])


@contextmanager
def _leased(place: _Place, say: Callable[[str], object]) -> Iterator[None]:
    lease = _Lease(place)
    lease.take(say)
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost:
            raise LostError(f"another run has taken over output={place.output.url!r}") from None
        raise
    finally:
        lease.give_back()


class _Lease:
    def __init__(self, place: _Place) -> None:
        self.place, self.holder, self.lost = place, _holder(), False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self, say: Callable[[str], object]) -> None:
        with refusing(self.place.output):
            self._wait(say)
            self.place.write(self.holder)
            time.sleep(SETTLE)
            found = self.place.read()
        if not self._mine(found):
            raise self.place.held(found)
        self._thread.start()

    def give_back(self) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join()
        # Where the store does not answer, the next run waits the lease out.
        try:
            if self._mine(self.place.read()):
                self.place.output.remove(self.place.holder)
        except Exception:  # noqa: BLE001 - as above
            pass

    def _wait(self, say: Callable[[str], object]) -> None:
        first, since = self.place.read(), time.monotonic()
        if first is None:
            return
        say(f"waiting up to {LEASE:.0f} s: {_described(first)} may still be writing to {self.place.output.url}")
        while time.monotonic() - since < LEASE:
            time.sleep(POLL)
            found = self.place.read()
            if found is None:
                return
            if found != first:
                raise self.place.held(found)

    def _renew(self) -> None:
        heard = time.monotonic()
        while not self._ends.wait(RENEWAL):
            try:
                if not self._mine(self.place.read()):
                    break
                self.holder["renewed"] = _now()
                self.place.write(self.holder)
                heard = time.monotonic()
            except Exception:  # noqa: BLE001 - a store's own errors are not all OSErrors, and this thread must not end unheard
                if time.monotonic() - heard > LEASE:
                    break
        else:
            return
        self.lost = True
        # The driver waits for Ray in its main thread: this is what it can be told by.
        os.kill(os.getpid(), signal.SIGINT)

    def _mine(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self.holder["token"]


def _holder() -> dict[str, Any]:
    now = _now()
    return {"token": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid(), "since": now, "renewed": now}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _described(holder: dict[str, Any]) -> str:
    if not {"host", "pid", "since"} <= holder.keys():
        return "another run"
    return f"a run on {holder['host']} (process {holder['pid']}, since {holder['since']})"
