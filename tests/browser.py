"""A real browser for tests of pages: Debian's Chromium, asked over its DevTools protocol through two pipes."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS = 60.0
"""An answer that takes longer never comes."""
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# The protocol's pipes are the file descriptors 3 and 4.
_LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"


def chromium() -> str | None:
    """Where Chromium is."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Page:
    """One tab.

    Usage: ``with Page(folder_for_its_profile) as page: page.open(url, width=1280)``.
    """

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.complaints: list[str] = []
        """What the console and the network said that is not well, since the last ``open``."""
        self._events: list[dict[str, Any]] = []
        self._number, self._buffer, self._session = 0, b"", ""

    def __enter__(self) -> Page:
        program = chromium()
        assert program is not None, "no Chromium on the path; `make browser` installs it on Debian"
        pairs = [os.pipe(), os.pipe()]
        # Above 4, so that the child's duplicates don't close each other.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (pairs[0][0], pairs[1][1])]
        for fd in (pairs[0][0], pairs[1][1]):
            os.close(fd)
        self._write, self._read = pairs[0][1], pairs[1][0]
        command = [sys.executable, "-c", _LAUNCH, *map(str, theirs), program, *_FLAGS, f"--user-data-dir={self.profile}"]
        self._process = subprocess.Popen(
            command, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in theirs:
            os.close(fd)
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            os.close(self._write)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def open(self, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Loads ``url`` in a window of this size, and waits until it has loaded."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self.complaints.clear()
        self._events.clear()
        self._ask("Page.navigate", url=url)
        deadline = time.monotonic() + SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        out = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def screenshot(self, to: Path) -> None:
        """The whole page, as far down as it goes."""
        out = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, fromSurface=True)
        to.write_bytes(base64.b64decode(out["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        asked = {"id": number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            message = self._take(deadline)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    def _take(self, deadline: float) -> dict[str, Any]:
        """The next message; events are kept, and what they complain of."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError(f"Chromium has ended, exit code {self._process.wait(5)}")
            self._buffer += data
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self._events.append(message)
            self.complaints += _complaints(message["method"], message["params"])
        return message


def _complaints(method: str, said: dict[str, Any]) -> Iterator[str]:
    if method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
        yield " ".join(str(each.get("value", each)) for each in said["args"])
    elif method == "Runtime.exceptionThrown":
        yield str(said["exceptionDetails"])
    elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
        yield str(said["entry"]["text"])
    elif method == "Network.loadingFailed":
        yield f"not loaded: {said.get('errorText')}"
    elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("data:", "file:", "about:")):
        yield f"asked the network for {said['request']['url']}"
