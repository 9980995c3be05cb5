"""The command line that the GPU kit and the program it runs have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.amounts import SECTIONS
from benchmarks.gpu.store import Store

MINUTES = sum(SECTIONS.values()) / 60


class Options(argparse.Namespace):
    """``sections`` are to be run, in order, each in so many ``seconds``; ``store`` holds what stays of earlier runs."""

    output: Path
    device: str
    size: str
    minutes: float
    only: str | None
    resume: bool
    sections: list[str]
    seconds: dict[str, float]
    store: Store


def parse(description: str, arguments: Sequence[str] | None) -> Options:
    """Ends the program with code 2 and one line for what is refused."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of gpu.json and gpu.md")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--size", choices=("11b", "tiny"), default="11b", help="tiny rehearses: it measures nothing; default: 11b")
    add("--minutes", type=float, default=MINUTES, help="nothing goes on for longer; default: %(default)g")
    add(
        "--only",
        "--sections",
        metavar="A,B=SECONDS",
        help=f"these sections alone, anew, the others stay as they are; {', '.join(SECTIONS)}; with seconds other than theirs",
    )
    add("--resume", action="store_true", help="only sections that the folder lacks, or that did not end well")
    options = parser.parse_args(arguments, Options())
    if options.device == "cpu" and options.size != "tiny":
        parser.error("--device cpu takes --size tiny: 11b has 22 GB of weights")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g} must be positive")
    named = list(SECTIONS)
    options.seconds = dict(SECTIONS)
    if options.only is not None:
        given = dict(part.partition("=")[::2] for part in options.only.split(","))
        named = list(given)
        for name, seconds in given.items():
            if name not in SECTIONS:
                parser.error(f"--only {name!r} is no section; they are {', '.join(SECTIONS)}")
            if seconds and not _positive(seconds):
                parser.error(f"--only {name}={seconds}: give a positive number of seconds")
            options.seconds[name] = float(seconds or SECTIONS[name])
    try:
        options.store = store = Store(options.output)
        store.cut_off()
    except ValueError as error:
        parser.error(str(error))
    rehearsal = options.size == "tiny"
    if store.exists and not store.rehearsal and rehearsal:
        parser.error(f"--output {options.output} holds figures that a GPU was measured for: rehearse elsewhere")
    if store.rehearsal != rehearsal or (options.only is None and not options.resume):
        store.sections = {}
    missing = set(store.missing()) if options.resume else set(SECTIONS)
    options.sections = [name for name in SECTIONS if name in named and name in missing]
    return options


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
