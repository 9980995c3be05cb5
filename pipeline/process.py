"""A process for what could hang, crash or eat memory: bytes go in through its pipe, bytes come out, and it can be ended.

A thread can't be ended. The process answers one question after another, each way a length and as many bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence

_LENGTH = struct.Struct("<Q")
_PIPE_BYTES = 1 << 20


class EndedError(RuntimeError):
    """The process has ended by itself, with ``code``, minus a signal's number; the text says how, e.g. ``SIGSEGV``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}" if code >= 0 else signal.Signals(-code).name)
        self.code = code


class Process:
    """``python -m module``, which calls ``serve``: begun when first needed, and anew after it ended. For one thread at a time.

    Args:
        module: what runs.
        seconds: within which an answer has to come.
    """

    def __init__(self, module: str, seconds: float) -> None:
        self.module, self.seconds = module, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], int | None] = int

    def ask(self, data: bytes) -> memoryview:
        """The answer to ``data``. Raises ``TimeoutError`` or ``EndedError``; the process is gone then."""
        process = self._process
        if process is None:
            process = self._process = _start(self.module)
            # Also when whoever holds this is let go, or Python ends.
            self._end = weakref.finalize(self, _end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + self.seconds
        try:
            _send(process.stdin.fileno(), _LENGTH.pack(len(data)), deadline)
            _send(process.stdin.fileno(), data, deadline)
            (count,) = _LENGTH.unpack(_receive(process.stdout.fileno(), _LENGTH.size, deadline))
            return memoryview(_receive(process.stdout.fileno(), count, deadline))
        except TimeoutError:
            self.close()
            raise
        except (BrokenPipeError, EOFError):
            raise EndedError(self.close()) from None

    def close(self) -> int:
        """Ends the process; its exit code."""
        self._process = None
        return self._end() or 0


def _end(process: subprocess.Popen[bytes]) -> int:
    assert process.stdin is not None
    # An idle one ends with its input; one that has died by itself keeps its own code.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.kill()
    # Closes the pipes too.
    with contextlib.suppress(BrokenPipeError), process:
        pass
    return process.returncode


def _start(module: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        # Ray puts a job's code on the path of its workers, where their children would not look.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
    )
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        # Fewer wakings an answer; an unprivileged user may have used up his share of such pipes.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return process


def _send(pipe: int, data: bytes, deadline: float) -> None:
    left = memoryview(data)
    while left:
        _wait(pipe, select.POLLOUT, deadline)
        left = left[os.write(pipe, left[:_PIPE_BYTES]) :]


def _receive(pipe: int, count: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while count:
        _wait(pipe, select.POLLIN, deadline)
        part = os.read(pipe, min(count, _PIPE_BYTES))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError


def serve(answer: Callable[[bytes], Sequence[bytes]]) -> None:
    """The process's own loop, until its input ends: ``answer`` returns the parts of what goes back."""
    # Whoever is interrupted ends its processes by closing their input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = sys.stdin.buffer
    # A library that prints must not get in between.
    answered = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while header := asked.read(_LENGTH.size):
        (count,) = _LENGTH.unpack(header)
        data = asked.read(count)
        if len(data) < count:
            return
        parts = answer(data)
        answered.write(_LENGTH.pack(sum(map(len, parts))))
        for part in parts:
            answered.write(part)
        answered.flush()
