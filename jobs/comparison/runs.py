"""Runs as their folders tell them: what was asked for, what is finished, and the rows, streamed by column."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import record, schema
from pipeline.parquet import damaged
from pipeline.storage import Storage

CHUNK_ROWS = 65_536
"""Rows of a table that ``Run.rows`` yields, about."""
_READERS = 8
_RUN = re.compile(r"run(-\d+-of-(\d+))?\.json")
# What is compared belongs to the name, what is the same in both runs does not.
_NAMED = ("max_tiles", "key_channels", "kept_sets", "tower_tiles", "tower_policy", "tower_keep")


@dataclass(frozen=True, slots=True)
class Run:
    """One run, all its partitions together; its rows are those of its finished units."""

    name: str
    """As the report calls it."""
    folder: Storage
    records: tuple[Mapping[str, Any], ...]
    """The contents of run.json, one for each partition that has begun."""
    finished: tuple[str, ...]
    """Names of the finished units."""
    stats: Mapping[str, Any]
    """Their statistics, summed by ``pipeline.record.summarise``."""
    device_seconds: Mapping[str, float]
    """By device's name: the actors' seconds on it, times the GPUs of an actor; on a CPU the actors' seconds."""
    untimed: int
    """Finished units whose statistics lack ``actor_seconds``; their stages' seconds stand in."""
    columns: frozenset[str]
    """Names of the output columns."""

    @property
    def record(self) -> Mapping[str, Any]:
        """The first partition's run.json; what decides the answers is the same in all."""
        return self.records[0]

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.record["config"]
        return config

    @property
    def input_digest(self) -> str:
        return str(self.record["decides"]["input"])

    @property
    def hardware(self) -> str:
        return str(self.stats["device"])

    @property
    def units(self) -> int:
        """Planned units of the partitions that have begun."""
        return sum(int(one["units"]) for one in self.records)

    @property
    def partitions(self) -> int:
        return int(self.config.get("partitions") or 1)

    @property
    def complete(self) -> bool:
        """Whether all partitions have begun and all their units are finished."""
        return len(self.records) == self.partitions and len(self.finished) >= self.units

    @property
    def answered(self) -> int:
        """Rows without an error."""
        return int(self.stats["rows"] - self.stats["errors"])

    @property
    def policy(self) -> str:
        return str(self.config["policy"])

    @property
    def max_tiles(self) -> int | None:
        value = self.config["max_tiles"]
        return None if value is None else int(value)

    @property
    def kept_sets(self) -> str | None:
        """Whether rows about one image shared what they kept (``image``) or each kept its own; None without a policy."""
        return None if self.policy == "none" else str(self.config["kept_sets"])

    @property
    def tower_tiles(self) -> str:
        """What became of padding tiles in the tower."""
        return str(self.config["tower_tiles"])

    @property
    def tower(self) -> str | None:
        """Which rows went on through the tower, and the share that was left of it, as in ``alike 0.5``; None for all."""
        policy = self.config["tower_policy"]
        return None if policy is None else f"{policy} {self.config['tower_keep']:g}"

    @property
    def options(self) -> dict[str, float]:
        """The policy's own options, those that say something."""
        from pipeline.config import POLICY_OPTIONS

        given = {name: self.config.get(name) for name in POLICY_OPTIONS.get(self.policy, {})}
        return {name: value for name, value in given.items() if value}

    def rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The finished rows' ``columns``, in tables of about ``CHUNK_ROWS`` rows. Raises ``ValueError`` for damaged files."""
        wanted = list(dict.fromkeys(columns))
        units = iter(self.finished)
        held: list[pa.Table] = []
        with ThreadPoolExecutor(_READERS) as pool:
            # A few files ahead and no more: a pool's own map would begin all of them.
            while batch := list(islice(units, 4 * _READERS)):
                for table in pool.map(lambda unit: _read_unit(self.folder, unit, wanted), batch):
                    held.append(table)
                    if sum(len(t) for t in held) >= CHUNK_ROWS:
                        yield pa.concat_tables(held)
                        held = []
        if held:
            yield pa.concat_tables(held)


def read_runs(given: Sequence[str], baseline: str, options: Mapping[str, Any]) -> list[Run]:
    """The baseline first, then the others in their order.

    Args:
        given: run folders, or ``NAME=FOLDER``.
        baseline: one of these by folder or name, or a further one.
        options: for s3fs.

    Raises ``ValueError``, in one line, for a folder without a run, one that can't be read or has no finished row, a run that is
    given twice, and names that are not unique.
    """
    asked = [_split(text) for text in given]
    place = _baseline(baseline, asked)
    if place is None:
        asked = [_split(baseline), *asked]
    else:
        asked = [asked[place], *asked[:place], *asked[place + 1 :]]
    storages = [Storage(folder, dict(options)) for _, folder in asked]
    for url, count in Counter(_same(folder) for _, folder in asked).items():
        if count > 1:
            raise ValueError(f"run {url!r} is given twice; name each run once")
    if len(asked) < 2:
        raise ValueError(f"there is only the baseline {baseline!r}; name a run to compare with it")
    runs = [read_run(storage, name or "") for storage, (name, _) in zip(storages, asked, strict=True)]
    named = _named(runs)
    twice = [name for name, count in Counter(run.name for run in named).items() if count > 1]
    if twice:
        where = " and ".join(run.folder.url for run in named if run.name == twice[0])
        raise ValueError(f"two runs are named {twice[0]!r} ({where}); name them apart with NAME=FOLDER")
    return named


def read_run(folder: Storage, name: str = "") -> Run:
    """The run in ``folder``. Raises ``ValueError`` where there is none, where it can't be read, and where it has no row yet."""
    url = folder.url
    found = [n for n in folder.names(".run") if _RUN.fullmatch(n)]
    if not found:
        raise ValueError(f"run {url!r} holds no run: there is no .run/run.json; name a job's --output folder")
    found.sort(key=lambda n: [int(digits) for digits in re.findall(r"\d+", n)])
    records = []
    for file in found:
        try:
            one = json.loads(folder.read(f".run/{file}"))
            for key in ("config", "decides", "checkpoint", "units", "columns"):
                one[key]
            one["config"]["policy"], one["decides"]["input"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"run {url!r} has an unreadable .run/{file} ({_short(error)})") from error
        records.append(one)
    if any(one["decides"] != records[0]["decides"] for one in records):
        raise ValueError(f"run {url!r} holds partitions of different runs ({found[0]} and others); compare them one by one")
    marked = [n.removesuffix(".json") for n in folder.names(record.UNITS) if n.endswith(".json")]
    finished = record.finished(folder, marked)
    try:
        markers = record.read_markers(folder, finished)
        stats = record.summarise(markers)
        seconds, untimed = _device_seconds(markers, records[0]["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"run {url!r} has an unreadable marker in {record.UNITS} ({_short(error)})") from error
    if not stats["rows"]:
        raise ValueError(f"run {url!r} has no finished rows yet; let it go on first")
    columns = frozenset(_schema(folder, finished[0]).names)
    missing = [f.name for f in schema.OUTPUT_FIELDS if f.name not in columns]
    if missing:
        raise ValueError(f"run {url!r} has output without the column {missing[0]!r}; was it written by another version?")
    return Run(name, folder, tuple(records), tuple(finished), stats, seconds, untimed, columns)


def _device_seconds(markers: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Seconds by device, and the units that lack a time of their own."""
    seconds: dict[str, float] = {}
    untimed = 0
    for unit in markers:
        device, spent, gpus = str(unit["device"]), unit.get("actor_seconds"), unit.get("gpus")
        if spent is None:
            untimed += 1
            spent = sum(unit["seconds"].get(stage, 0.0) for stage in ("tower", "prefill", "decode"))
        if gpus is None:
            gpus = 0 if device.startswith("CPU") else config.get("gpus_per_actor") or 1
        seconds[device] = seconds.get(device, 0.0) + spent * (gpus or 1)
    return dict(sorted(seconds.items())), untimed


def _read_unit(folder: Storage, unit: str, columns: Sequence[str]) -> pa.Table:
    name = f"{unit}.parquet"
    try:
        if folder.local:
            file = folder.path(name)
            return pq.read_table(file, columns=columns, partitioning=None, page_checksum_verification=True).select(columns)
        # One request: a unit's file is small, and a reader would ask for its footer and each column.
        data = pa.BufferReader(folder.read(name))
        return pq.read_table(data, columns=columns, page_checksum_verification=True).select(columns)
    except (pa.ArrowException, KeyError, OSError) as error:
        if isinstance(error, OSError) and not damaged(error):
            raise
        raise ValueError(f"run {folder.url!r} has an unreadable {name} ({_short(error)})") from error


def _schema(folder: Storage, unit: str) -> pa.Schema:
    name = f"{unit}.parquet"
    try:
        return pq.read_schema(pa.BufferReader(folder.read(name)))
    except pa.ArrowException as error:
        raise ValueError(f"run {folder.url!r} has an unreadable {name} ({_short(error)})") from error


def _split(text: str) -> tuple[str | None, str]:
    """(name, folder) of ``NAME=FOLDER`` or ``FOLDER``. A folder may have an equals sign in its path."""
    name, equals, folder = text.partition("=")
    if not equals or "/" in name or os.path.isdir(text):
        return None, text
    if not name.strip() or not folder.strip():
        raise ValueError(f"run {text!r} is neither a folder nor NAME=FOLDER")
    return name.strip(), folder


def _baseline(baseline: str, asked: Sequence[tuple[str | None, str]]) -> int | None:
    """Place of the run that ``--baseline`` means; None where it is one more."""
    name, folder = _split(baseline)
    for place, (other, url) in enumerate(asked):
        if baseline == other or (_same(folder) == _same(url) and name in (None, other)):
            return place
    if name is None and "/" not in folder and not os.path.isdir(folder):
        names = ", ".join(repr(other or url) for other, url in asked)
        raise ValueError(f"baseline={baseline!r} is neither a folder nor one of the runs ({names})")
    return None


def _same(folder: str) -> str:
    """Equal for folders that are spelled differently."""
    return folder.rstrip("/") if "://" in folder and not folder.startswith("file:") else Storage(folder).open()[1]


def _named(runs: Sequence[Run]) -> list[Run]:
    """Runs without a name get their policy's, with the folder's behind it where two would have the same."""
    default = [
        " ".join([run.policy, *(f"{k}={v:g}" for k, v in run.options.items()), *(f"{n}={v}" for n, v in _set(run).items())])
        for run in runs
    ]
    counts = Counter(run.name or name for run, name in zip(runs, default, strict=True))
    named = []
    for run, name in zip(runs, default, strict=True):
        if not run.name and counts[name] > 1:
            name = f"{name} ({run.folder.url.rstrip('/').rsplit('/', 1)[-1]})"
        named.append(run if run.name else replace(run, name=name))
    return named


def _set(run: Run) -> dict[str, Any]:
    """Of the options in ``_NAMED`` those that are not at their default."""
    from pipeline.config import RunConfig

    values = {name: run.config.get(name) for name in _NAMED} | {"kept_sets": run.kept_sets}
    # A run writes down what its default came to.
    usual = {name: each.default for name, each in RunConfig.__dataclass_fields__.items()} | {"tower_tiles": "pooled"}
    return {name: value for name, value in values.items() if value is not None and value != usual[name]}


def _short(error: Exception) -> str:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return " ".join(said.split())[:200]
