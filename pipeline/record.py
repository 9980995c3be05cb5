"""The run's own files, all under ``.run/`` in the output folder: what it is, what is finished, how it went.

    .run/run.json        resolved configuration, versions, and what decides the output
    .run/units/NAME.json marker of a finished unit, with its statistics
    .run/unfinished/     files on their way
    .run/lock, .run/holder.json
                         who writes here at present; see pipeline.lock
    .run/summary.json    totals, written last

Partitions of a run, which independent jobs work at, have one of each, the markers apart: ``run-3-of-8.json`` and so on.
``part`` is that insert, or empty.

A dotted folder, since parquet readers skip that; not all of them skip a name with an underscore in front.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import errors
from pipeline.storage import Storage

RUN = ".run/run{part}.json"
SUMMARY = ".run/summary{part}.json"
UNITS = ".run/units"
UNFINISHED = ".run/unfinished{part}"
LOCK = ".run/lock{part}"
HOLDER = ".run/holder{part}.json"

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
    "tower_keep_fraction_sum",
    "judged",
    "correct",
    "images_encoded",
    "image_hits",
    "decode_steps",
    "decode_tokens",
)
_HELD = ("cross_kv_byte_seconds", "cross_kv_byte_seconds_full", "cross_kv_bytes_read")
"""What the machine held and read of images' keys and values, what rows share counted once; None where a unit lacks them."""
_PEAKS = ("peak_memory_bytes", "peak_sequences", "peak_kv_bytes", "peak_cross_kv_bytes")


_RUN = re.compile(r"run(-\d+-of-\d+)?\.json")
_SUMMARY = re.compile(r"summary(-\d+-of-\d+)?\.json")
# See units.unit_name.
_UNIT_FILE = re.compile(r".*-[0-9a-f]{10}-\d{7,}-\d{7,}\.parquet")


FORMAT = 5
"""Version of what ``decides`` holds, to be raised when that changes: two starts of one run must agree on it."""


class RefusalError(ValueError):
    """The output folder holds something that this run must not touch."""


def marker(unit: str) -> str:
    """Path of a unit's marker."""
    return f"{UNITS}/{unit}.json"


def part(i: int, n: int) -> str:
    """What the names of partition ``i`` of ``n`` have inserted."""
    return f"-{i}-of-{n}" if n > 1 else ""


def check_output(output: Storage, decides: dict[str, Any], config: dict[str, Any], part: str = "") -> bool:
    """Whether the folder holds this very run, or partition of it, begun earlier; False for a free folder, and for one in which
    only other partitions have begun. Raises ``RefusalError`` otherwise.

    ``decides`` is what two runs must share to write into one folder; ``config`` is this run's, as it would be recorded.
    """
    own = RUN.format(part=part)
    runs = [f".run/{name}" for name in output.names(".run") if _RUN.fullmatch(name)]
    if not runs:
        _check_free(output)
        return False
    begun = own in runs
    name = own if begun else runs[0]
    try:
        run = json.loads(output.read(name))
        found, there = run["decides"], run["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusalError(f"output={output.url!r} holds an unreadable {name}; choose another folder") from error
    differ = [name for name in decides if found.get(name) != _as_json(decides[name])]
    if "format" in differ:
        raise RefusalError(
            f"output={output.url!r} holds a run that another version of this program began; finish it with that version, "
            "choose another folder, or delete that run with --overwrite"
        )
    if differ:
        was = (_was(there.get(name), config.get(name), found.get(name), decides[name]) for name in differ)
        said = ", ".join(f"{name} ({how})" for name, how in zip(differ, was, strict=True))
        raise RefusalError(
            f"output={output.url!r} holds another run, which differs in {said}; choose another folder, or delete that run with "
            "--overwrite"
        )
    return begun


def _check_free(output: Storage) -> None:
    if output.local and os.path.exists(path := output.open()[1]) and not os.path.isdir(path):
        raise RefusalError(f"output={output.url!r} is a file; name a folder")
    foreign = [n for n in output.names() if not n.startswith(".")]
    if foreign:
        raise RefusalError(f"output={output.url!r} holds files of something else ({foreign[0]}); choose another folder")


def own_files(output: Storage) -> list[str]:
    """All files of the run in the folder; none where there is no run.

    Raises ``RefusalError`` where other files lie among them.
    """
    own = output.names(".run")
    runs = [f".run/{name}" for name in own if _RUN.fullmatch(name)]
    if not runs:
        return []
    names = output.names()
    data = [name for name in names if _UNIT_FILE.fullmatch(name)]
    foreign = [name for name in names if name not in data and not name.startswith(".")]
    if foreign:
        raise RefusalError(
            f"output={output.url!r} holds files that no run wrote ({foreign[0]}), and overwrite spares them; move them"
        )
    markers = [f"{UNITS}/{name}" for name in output.names(UNITS)]
    return [*data, *markers, *(f".run/{name}" for name in own if _SUMMARY.fullmatch(name)), *runs]


def _was(there: Any, here: Any, found: Any, decides: Any) -> str:
    """What differs: an option, or what is in the files that it names."""
    if there != _as_json(here):
        return f"{there!r} there, {_as_json(here)!r} here"
    if not isinstance(found, dict) or not isinstance(decides, dict):
        return "its files have changed"
    names = sorted(name for name in found.keys() | decides.keys() if found.get(name) != decides.get(name))
    return f"its files have changed: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def delete(output: Storage, names: Sequence[str]) -> None:
    """Deletes ``own_files``, what tells that there is a run last: a deletion that breaks off can be taken up again."""
    last = {name for name in names if _RUN.fullmatch(name.removeprefix(".run/"))}
    output.remove(*(name for name in names if name not in last))
    output.remove(*last)


def begin(output: Storage, run: dict[str, Any], part: str = "") -> None:
    """Writes run.json. ``run`` holds ``decides`` among the rest."""
    output.write(RUN.format(part=part), json.dumps(run, indent=2).encode(), temporary=UNFINISHED.format(part=part))


def stamps(output: Storage, part: str = "") -> dict[str, str]:
    """What the shards' stamps were when the run was last begun, by name; see ``Shard.stamp``."""
    found: dict[str, str] = json.loads(output.read(RUN.format(part=part))).get("stamps", {})
    return found


def clear_unfinished(output: Storage, part: str = "") -> None:
    """Deletes what killed writers left on its way; only for who holds the lock, once nobody writes."""
    folder = UNFINISHED.format(part=part)
    output.remove(*(f"{folder}/{name}" for name in output.names(folder)))


def finished(output: Storage, units: Iterable[str]) -> list[str]:
    """Those of ``units`` whose file and marker are both there."""
    marked = {name.removesuffix(".json") for name in output.names(UNITS)}
    written = {name.removesuffix(".parquet") for name in output.names() if name.endswith(".parquet")} if marked else set()
    return [unit for unit in units if unit in marked and unit in written]


def read_markers(output: Storage, units: Sequence[str]) -> list[dict[str, Any]]:
    """The finished units' statistics."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda unit: json.loads(output.read(marker(unit))), units))


def summarise(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adds up units' statistics. Seconds are summed over actors; peaks are the most of any; absent values are left out.

    ``actor_seconds`` is the time of all actors from when each was ready to the end of its last unit, and ``gpu_seconds`` that
    time by the GPUs each held; loading the model, and work that was lost, is in neither. Both are None where a unit lacks them,
    and so is what was held and read of images' keys and values: ``cross_kv_byte_seconds``, the same with all features kept
    (``cross_kv_byte_seconds_full``, computed), and ``cross_kv_bytes_read``. ``cross_kv_bytes`` and ``cross_kv_bytes_full`` are
    sums over rows, as if no row shared its cache with another.
    """
    totals: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    seconds: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    peaks = dict.fromkeys(_PEAKS, 0)
    dtypes: set[str] = set()
    kinds: list[errors.Kinds] = []
    for unit in stats:
        kinds.append(unit.get("error_kinds", {}))
        for name in _SUMS:
            totals[name] += unit.get(name, 0)
        seconds.update(unit["seconds"])
        devices[unit["device"]] += unit["rows"]
        dtypes.add(unit["dtype"])
        peaks = {name: max(most, unit.get(name, 0)) for name, most in peaks.items()}
    trimmed_rows, kept = totals.pop("keep_fraction_rows"), totals.pop("keep_fraction_sum")
    tower_kept = totals.pop("tower_keep_fraction_sum")
    judged, correct = totals.pop("judged"), totals.pop("correct")
    totals["error_kinds"] = errors.merge(kinds)
    totals["mean_keep_fraction"] = kept / trimmed_rows if trimmed_rows else None
    totals["mean_tower_keep_fraction"] = tower_kept / trimmed_rows if trimmed_rows else None
    totals["accuracy"] = correct / judged if judged else None
    totals["judged"] = judged
    totals["device"] = ", ".join(sorted(devices))
    totals["dtype"] = ", ".join(sorted(dtypes))
    totals |= peaks
    totals |= {name: _whole([unit.get(name) for unit in stats]) for name in (*_HELD, "actor_seconds")}
    totals["gpu_seconds"] = None
    if totals["actor_seconds"] is not None:
        totals["gpu_seconds"] = _whole([unit["actor_seconds"] * unit.get("gpus", 0.0) for unit in stats])
    totals["seconds_per_stage"] = {name: round(value, 3) for name, value in sorted(seconds.items())}
    return totals


def _whole(values: Sequence[float | None]) -> float | None:
    """The sum; None where a value is missing, since a part must not pass for the whole: bills are made from it."""
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if len(known) == len(values) else None


def write_summary(output: Storage, summary: dict[str, Any], part: str = "") -> None:
    output.write(SUMMARY.format(part=part), json.dumps(summary, indent=2).encode(), temporary=UNFINISHED.format(part=part))


def read_summary(output: Storage, part: str = "") -> dict[str, Any] | None:
    """The finished run's, or partition's, summary, or None."""
    try:
        summary: dict[str, Any] = json.loads(output.read(SUMMARY.format(part=part)))
    except (FileNotFoundError, ValueError):
        return None
    return summary
