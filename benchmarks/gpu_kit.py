"""Prove the CUDA path in minutes: ``python -m benchmarks.gpu_kit --output FOLDER --minutes 8``.

Runs the sections of ``benchmarks.gpu`` (correctness, the demo's answers, roofline, tower, prefill, decode, captioning,
questions) in order of their worth in a process of their own and watches it. A section that hangs is ended, one that takes the
device down costs a process, and the next ones go on in another. Whatever was measured is in ``gpu.json`` and ``gpu.md`` by
then, so that the kit itself may be cut off at any time: ``--resume`` takes up what is missing. ``--device cpu --size tiny``
rehearses all of it, CUDA's kernels in Triton's interpreter, and measures nothing. docs/gpu.md says how to take the kit to a
machine.

Exit codes: 0 all sections done, or no GPU; 1 one failed or was not reached, which the page names; 2 refused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.options import Options, parse
from benchmarks.gpu.store import Store

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15.0
"""Seconds that a section may take beyond its time: it asks the clock only between its figures."""
START_SECONDS = 90.0
"""In which the program has to begin a section, from its start or from the end of the one before: imports, the large model."""
EVERY = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(__doc__ or "", arguments)
    started, end = time.time(), time.monotonic() + options.minutes * 60
    # Ends the program too, which lives in a session of its own.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    left, flags = list(options.sections), _flags(options)
    try:
        while left and time.monotonic() < end:
            code = _watch(options, _command(options, flags, end), started, end)
            sections = Store(options.output).sections
            # What was tried is not tried again: it would end the same way.
            rest = [name for name in left if sections.get(name, {}).get("began", 0.0) < started]
            if rest == left:
                return _nothing(code)
            left, flags = rest, ["--only", ",".join(f"{name}={options.seconds[name]:g}" for name in rest)]
    finally:
        signal.signal(signal.SIGTERM, before)
    store = Store(options.output)
    if store.exists:
        print((options.output / "gpu.md").read_text())
    wrong = [name for name in options.sections if store.sections.get(name, {}).get("status") != "done"]
    for name in wrong:
        print(f"{name}: {store.sections.get(name, {}).get('status', 'not reached')}", file=sys.stderr)
    return 1 if wrong else 0


def _nothing(code: int) -> int:
    """The program ended without beginning a section: there is no GPU, or it could not start."""
    if code:
        print(f"the program ended with code {code} before it began a section; its last words are above", file=sys.stderr)
        return 1
    print("no CUDA device: the GPU kit was skipped")
    return 0


def _flags(options: Options) -> list[str]:
    return [*(["--only", options.only] if options.only else []), *(["--resume"] if options.resume else [])]


def _command(options: Options, flags: Sequence[str], end: float) -> list[str]:
    minutes = max(end - time.monotonic(), 1.0) / 60
    given = ["--output", str(options.output.resolve()), "--device", options.device, "--size", options.size]
    return [sys.executable, "-m", "benchmarks.gpu", *given, "--minutes", f"{minutes:.4f}", *flags]


def _watch(options: Options, command: Sequence[str], started: float, end: float) -> int:
    """Runs the program until it ends or has to be ended; its exit code. A section that it leaves behind is marked."""
    folder = options.output
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    program = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    said = threading.Thread(target=_tee, args=(program, folder), daemon=True)
    said.start()
    try:
        why = _wait(program, options, started, end)
    finally:
        # Its own children too, such as pytest; none of them outlives it.
        code = _kill(program)
        said.join(5)
    store = Store(folder)
    for section in store.sections.values():
        if section["status"] in ("loading", "running") and section.get("began", started) >= started:
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            section |= {"status": "timed out" if why else "killed", "error": why or f"its process ended with {ended}"}
            if "began" in section:
                section["took"] = time.time() - section["began"]
            store.save()
    return code


def _wait(program: subprocess.Popen[str], options: Options, started: float, end: float) -> str | None:
    """Until the program ends, or why it has to be ended."""
    running, since = None, time.monotonic()
    while program.poll() is None:
        time.sleep(EVERY)
        sections, now = Store(options.output).sections, time.monotonic()
        active = [n for n, s in sections.items() if s["status"] == "running" and s["began"] >= started]
        name = active[0] if active else None
        if name != running:
            running, since = name, now
        limit = START_SECONDS if name is None else options.seconds[name] + GRACE
        if now - since > limit:
            return f"it took over {limit:.0f} s"
        if now > end:
            return "the kit's time was over"
    return None


def _tee(program: subprocess.Popen[str], folder: Path) -> None:
    """What the program says, on this one's stderr and in a file beside the results."""
    assert program.stderr is not None
    folder.mkdir(parents=True, exist_ok=True)
    with program.stderr, (folder / "gpu.log").open("a") as log:
        for line in program.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            print(line, end="", file=log, flush=True)


def _kill(program: subprocess.Popen[str]) -> int:
    """Its exit code; that of a kill for one that hangs in the driver, which nothing ends."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    try:
        return program.wait(20)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main())
