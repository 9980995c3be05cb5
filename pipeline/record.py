"""The run's own files, all under ``.run/`` in the output folder: what it is, what is finished, how it went.

    .run/run.json        resolved configuration, versions, and what decides the output
    .run/units/NAME.json marker of a finished unit, with its statistics
    .run/unfinished/     files on their way
    .run/summary.json    totals, written last

A dotted folder, since parquet readers skip that; not all of them skip a name with an underscore in front.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.storage import Storage

RUN = ".run/run.json"
SUMMARY = ".run/summary.json"
UNITS = ".run/units"
UNFINISHED = ".run/unfinished"

_SUMS = (
    "rows",
    "errors",
    "images",
    "tiles",
    "prompt_tokens",
    "output_tokens",
    "cross_kv_bytes_full",
    "cross_kv_bytes",
    "self_kv_bytes",
    "keep_fraction_sum",
    "keep_fraction_rows",
    "judged",
    "correct",
    "images_encoded",
    "image_hits",
    "decode_steps",
    "decode_tokens",
)
_PEAKS = ("peak_memory_bytes", "peak_sequences", "peak_kv_bytes", "peak_cross_kv_bytes")


class RefusalError(ValueError):
    """The output folder holds something that this run must not touch."""


def marker(unit: str) -> str:
    """Path of a unit's marker."""
    return f"{UNITS}/{unit}.json"


def check_output(output: Storage, decides: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the folder holds this very run, begun earlier; False for a free folder. Raises ``RefusalError`` otherwise.

    ``decides`` is what two runs must share to write into one folder; ``config`` is this run's, as it would be recorded.
    """
    try:
        run = json.loads(output.read(RUN))
        found, there = run["decides"], run["config"]
    except FileNotFoundError:
        found = None
    except (ValueError, KeyError, TypeError) as error:
        raise RefusalError(f"output={output.url!r} holds an unreadable {RUN}; choose another folder") from error
    except NotADirectoryError as error:
        raise RefusalError(f"output={output.url!r} is a file; name a folder") from error
    if found is None:
        if output.local and output.open()[0].isfile(output.open()[1]):
            raise RefusalError(f"output={output.url!r} is a file; name a folder")
        foreign = [n for n in output.names() if not n.startswith(".")]
        if foreign:
            raise RefusalError(f"output={output.url!r} holds files of something else ({foreign[0]}); choose another folder")
        return False
    differ = [name for name in decides if found.get(name) != _as_json(decides[name])]
    if differ:
        said = ", ".join(f"{name} ({_was(there.get(name), config[name])})" for name in differ)
        raise RefusalError(f"output={output.url!r} holds another run, which differs in {said}; choose another folder")
    return True


def _was(there: Any, here: Any) -> str:
    return "its files have changed" if there == _as_json(here) else f"{there!r} there, {_as_json(here)!r} here"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def begin(output: Storage, run: dict[str, Any]) -> None:
    """Writes run.json. ``run`` holds ``decides`` among the rest."""
    output.write(RUN, json.dumps(run, indent=2).encode(), temporary=UNFINISHED)


def finished(output: Storage, units: Iterable[str]) -> list[str]:
    """Those of ``units`` whose file and marker are both there."""
    marked = {name.removesuffix(".json") for name in output.names(UNITS)}
    written = {name.removesuffix(".parquet") for name in output.names() if name.endswith(".parquet")} if marked else set()
    return [unit for unit in units if unit in marked and unit in written]


def read_markers(output: Storage, units: Sequence[str]) -> list[dict[str, Any]]:
    """The finished units' statistics."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda unit: json.loads(output.read(marker(unit))), units))


def summarise(stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Adds up units' statistics. Seconds are summed over actors; peaks are the most of any; absent values are left out."""
    totals: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    seconds: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    peaks = dict.fromkeys(_PEAKS, 0)
    dtypes: set[str] = set()
    for unit in stats:
        for name in _SUMS:
            totals[name] += unit.get(name, 0)
        seconds.update(unit["seconds"])
        devices[unit["device"]] += unit["rows"]
        dtypes.add(unit["dtype"])
        peaks = {name: max(most, unit.get(name, 0)) for name, most in peaks.items()}
    trimmed_rows, kept = totals.pop("keep_fraction_rows"), totals.pop("keep_fraction_sum")
    judged, correct = totals.pop("judged"), totals.pop("correct")
    totals["mean_keep_fraction"] = kept / trimmed_rows if trimmed_rows else None
    totals["accuracy"] = correct / judged if judged else None
    totals["judged"] = judged
    totals["device"] = ", ".join(sorted(devices))
    totals["dtype"] = ", ".join(sorted(dtypes))
    totals |= peaks
    totals["seconds_per_stage"] = {name: round(value, 3) for name, value in sorted(seconds.items())}
    return totals


def write_summary(output: Storage, summary: dict[str, Any]) -> None:
    output.write(SUMMARY, json.dumps(summary, indent=2).encode(), temporary=UNFINISHED)


def read_summary(output: Storage) -> dict[str, Any] | None:
    """The finished run's summary, or None."""
    try:
        summary: dict[str, Any] = json.loads(output.read(SUMMARY))
    except (FileNotFoundError, ValueError):
        return None
    return summary
