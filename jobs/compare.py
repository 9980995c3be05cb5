"""Compare runs: what each cost, how far its answers agree with a baseline's, and how sure that is, on a page."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from jobs import options

NEEDS = ("sacrebleu", "rapidfuzz", "jinja2", "matplotlib")
"""What the extra ``report`` brings."""
REPORT = "report.json"
_WRITTEN = {REPORT, "index.html", "report.md", "plots", "examples"}


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="python -m jobs.compare", description=__doc__, exit_on_error=False, allow_abbrev=False)
    made.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, local or s3://, or NAME=FOLDER")
    made.add_argument("--baseline", type=str, required=True, help="what the others are compared with: a run, by folder or name")
    made.add_argument("--out", type=str, required=True, help="local folder of the report; an earlier report there is replaced")
    made.add_argument(
        "--price",
        action="append",
        type=str,
        metavar="NAME=DOLLARS",
        help="dollars an hour of hardware with this word in its name, e.g. h200=3.5 or cpu=0.1; may be given several times",
    )
    made.add_argument("--prices", type=str | None, help="YAML file of such prices; hardware without one has no dollars")
    made.add_argument("--references", type=str | None, help="column of references; default: the runs' own answer column")
    made.add_argument("--examples", type=int, default=10, help="rows to show whose answers differ, for each run")
    made.add_argument("--input", type=str | None, help="where the shards of the images are now, if they have moved")
    made.add_argument("--storage-options", type=dict, default={}, help="options for s3fs (JSON or YAML); never recorded")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, reads, compares and writes; returns the exit code: 0 done, 1 broke off, 2 refused with nothing written."""
    made = parser()
    options.escape_unencodable()
    try:
        given = made.parse_args(arguments).as_dict()
        report, runs, out = _read(given)
        out.mkdir(parents=True, exist_ok=True)
    except KeyboardInterrupt:
        return options.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever a store answers: nothing has been written
        return options.refuse(made, error)
    try:
        # Whole or not at all, so that no half file stands for a report.
        unfinished = out / f".{REPORT}"
        unfinished.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, out / REPORT)
        from jobs.comparison import page

        page.write(
            report,
            runs,
            out,
            examples=given["examples"],
            input=given["input"],
            storage_options=given["storage_options"],
            references=given["references"],
        )
    except KeyboardInterrupt:
        return options.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the program's boundary: one line and an exit code that tells the truth
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        print(f"{made.prog}: the report broke off: {said}", file=sys.stderr)
        return options.FAILED
    print(out / "index.html")
    return 0


def _read(given: dict[str, Any]) -> tuple[dict[str, Any], list[Any], Path]:
    """The report, its runs and its folder. Raises ``ValueError`` and ``OSError`` for what is refused."""
    if given["examples"] < 0:
        raise ValueError(f"examples={given['examples']} must not be negative; 0 shows none")
    out = _folder(given["out"])
    _check_installed()
    from jobs.comparison import prices, report
    from jobs.comparison.runs import read_runs

    priced, typed = prices.read_prices(given["price"] or [], given["prices"])
    runs = read_runs(given["runs"], given["baseline"], given["storage_options"])
    devices = [device for run in runs for device in run.device_seconds]
    prices.check_typed(typed, devices)
    for device in dict.fromkeys(devices):
        if prices.match(device, priced) is None:
            _say(f"no price for {device!r}, so no dollars for runs on it; state one with --price NAME=DOLLARS")
    for run in runs:
        if not run.complete:
            _say(f"{run.name} is incomplete: {len(run.finished):,} of {run.units:,} units are compared")
    asked, examples = given["references"], given["examples"]
    return report.build(runs, priced, references=asked, examples=examples, say=_say), runs, out


def _folder(out: str) -> Path:
    """Where the report goes. Raises ``ValueError`` for a place that holds something else."""
    if "://" in out:
        raise ValueError(f"out={out!r} is not a local folder; copy the report there afterwards")
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out!r} is a file; name a folder")
    names = {path.name for path in folder.iterdir() if path.name != f".{REPORT}"} if folder.exists() else set()
    foreign = sorted(names - _WRITTEN) or sorted(names if REPORT not in names else ())
    if foreign:
        raise ValueError(f"out={out!r} holds something that is no report ({foreign[0]}); choose another folder")
    return folder


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(f"reports need {', '.join(missing)}; install the extra: pip install 'trimmed-mllama[report]'")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
