"""Images are decoded in processes of their own: what hangs, crashes or eats memory there is one row's error, and can be ended.

A thread can't be: a progressive JPEG of a thousand scans holds it for minutes inside of libjpeg. A process decodes one file
after another, asked and answered through its pipes: the file's length and bytes go in, RGB or an error comes out.
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
from collections.abc import Callable
from typing import IO

from PIL import Image

from pipeline.pictures import ImageError, decode

SECONDS = 30.0
"""An image that is not decoded by then never will be."""
MEMORY_BYTES = 2 << 30
"""Address space of a decoding process; 20 megapixels in any mode take half of it."""

_ASKED = struct.Struct("<Q")
# Status, then width and height, or an error's length and nothing.
_ANSWERED = struct.Struct("<BII")
_RGB, _ERROR = 0, 1
_PIPE_BYTES = 1 << 20


class Decoder:
    """One decoding process: begun when first needed, and anew after one had to be ended. For one thread at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], int | None] = int

    def __call__(self, data: bytes) -> Image.Image:
        """``pictures.decode`` of ``data``. Raises ``ImageError``, also for what hangs or ends the process."""
        process = self._process
        if process is None:
            process = self._process = _start()
            # Also when whoever holds this is let go, or Python ends.
            self._end = weakref.finalize(self, _end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + self.seconds
        try:
            _send(process.stdin.fileno(), _ASKED.pack(len(data)), deadline)
            _send(process.stdin.fileno(), data, deadline)
            status, width, height = _ANSWERED.unpack(_receive(process.stdout.fileno(), _ANSWERED.size, deadline))
            if status == _ERROR:
                raise ImageError(_receive(process.stdout.fileno(), width, deadline).decode())
            return Image.frombytes("RGB", (width, height), _receive(process.stdout.fileno(), width * height * 3, deadline))
        except TimeoutError:
            self.close()
            raise ImageError(f"the image can't be decoded in {self.seconds:g} s") from None
        except (BrokenPipeError, EOFError):
            code = self.close()
            raise ImageError(f"decoding the image ended its process ({_ending(code)})") from None

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


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.decoder"],
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
        # Fewer wakings an image; an unprivileged user may have used up his share of such pipes.
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


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def serve(asked: IO[bytes], answered: IO[bytes]) -> None:
    """The process's loop: decodes until its input ends."""
    while header := asked.read(_ASKED.size):
        (count,) = _ASKED.unpack(header)
        data = asked.read(count)
        if len(data) < count:
            return
        try:
            image = decode(data)
            answered.write(_ANSWERED.pack(_RGB, *image.size))
            answered.write(image.tobytes())
        except (ImageError, MemoryError) as error:
            said = str(error) or f"the image needs more than {MEMORY_BYTES >> 30} GiB to be decoded"
            encoded = said.encode(errors="replace")
            answered.write(_ANSWERED.pack(_ERROR, len(encoded), 0))
            answered.write(encoded)
        answered.flush()


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    # Whoever is interrupted ends its decoders by closing their input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    # A library that prints must not get in between.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
