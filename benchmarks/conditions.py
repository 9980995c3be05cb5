"""Where something was measured: the processor and the commit, for every table that this repository quotes."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The processor's name; its architecture where the system does not tell."""
    said = Path("/proc/cpuinfo")
    lines = said.read_text().splitlines() if said.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """What is checked out; in a copy without git what the variable COMMIT says."""
    head = _git("rev-parse", "HEAD")
    if head == "unknown":
        return os.environ.get("COMMIT", head)
    # A benchmark's own results are no change of what it measures.
    changed = _git("status", "--porcelain", "--", ".", ":!*/results/*")
    return f"{head} and uncommitted changes" if changed else head


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
