"""The shards that an input names, and what lies beside them and is not read."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.utils import glob_translate

from pipeline.storage import Storage, filesystem, is_local

HIDDEN = "named like records, with . or _ in front"
OTHER = "not named *.parquet"
AGAIN = "read under another name already"
OUTPUT = "in the output folder"

_MAGIC = "*?["
_DOTTED = re.compile(r"\.")
_RECORDS = re.compile(r"\.|_(?!.*=)")


@dataclass(frozen=True, slots=True)
class Listing:
    """An input's shards, as names relative to ``root``, sorted."""

    root: Storage
    names: list[str]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """By reason: files, and folders with a slash behind them, that were left out."""

    def without(self, output: Storage) -> Listing:
        """The same, less what lies in the ``output`` folder, also where a link leads there."""
        real: Callable[[str], str] = os.path.realpath if self.root.local and output.local else str
        prefix = real(output.open()[1]).rstrip("/") + "/"
        inside = [name for name in self.names if real(self.root.path(name)).startswith(prefix)]
        if not inside:
            return self
        left = sorted(set(self.names) - set(inside))
        return replace(self, names=left, skipped={**self.skipped, OUTPUT: inside})


def list_input(url: str, options: dict[str, Any]) -> Listing:
    """The shards of ``url``: a file, a folder (its ``*.parquet`` at any depth) or a glob.

    The root is the folder, the file's folder, or the folder above a glob's first wildcard. Local folders are read through
    symbolic links, each once. Names that begin with a dot are records and never read. So are those with an underscore, Spark's
    and Hadoop's markers and unfinished files, but for ``_key=value`` folders and where a glob itself writes the underscore.

    Raises ``FileNotFoundError`` where nothing is left, and ``ValueError`` for a shard whose name can't be used.
    """
    fs, path = filesystem(url, options)
    try:
        looked = _look(fs, path.rstrip("/"), is_local(url))
    except Exception as error:
        # Stores say no more than "Access Denied".
        raise ValueError(f"input={url!r} can't be listed ({type(error).__name__}: {error})") from error
    if looked is None:
        raise FileNotFoundError(f"input={url!r} does not exist")
    root, found, left_out = looked[0], looked[1], looked[2].entries()
    if not found:
        beside = f"; {describe(left_out)}" if left_out else ""
        raise FileNotFoundError(f"input={url!r} holds no parquet file{beside}")
    for path in found:
        _check_name(path)
    scheme = "" if is_local(url) else url.split("://", 1)[0] + "://"
    return Listing(Storage(scheme + root, options), sorted(_relative(path, root) for path in found), left_out)


def describe(skipped: dict[str, list[str]]) -> str:
    """E.g. ``skipped 2 named like records, with . or _ in front (_SUCCESS, _temporary/)``."""
    parts = []
    for reason, entries in skipped.items():
        shown = ", ".join(entry.encode(errors="backslashreplace").decode() for entry in entries[:3])
        parts.append(f"{len(entries):,} {reason} ({shown}{', …' if len(entries) > 3 else ''})")
    return f"skipped {'; '.join(parts)}"


class _Skipped:
    """What was left out, as it is found."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = {}

    def add(self, reason: str, entries: Iterable[str]) -> None:
        self._found.setdefault(reason, set()).update(entries)

    def entries(self) -> dict[str, list[str]]:
        return {reason: sorted(found) for reason, found in self._found.items() if found}


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        said = path.encode(errors="backslashreplace").decode()
        raise ValueError(f"the file name {said} is not UTF-8, as ids and the output's names have to be; rename it") from None
    if "//" in path:
        raise ValueError(
            f"the key {path!r} has an empty name between two slashes, which no path says; rename it, or name others"
        )


def _look(fs: AbstractFileSystem, path: str, local: bool) -> tuple[str, list[str], _Skipped] | None:
    """The root, and paths under it; None where there is no such path. Raises what the store raises."""
    # A file's own name may hold a wildcard character.
    if fs.exists(path):
        if fs.isfile(path):
            return posixpath.dirname(path), [path], _Skipped()
        found, skipped = _find(fs, path, local)
        skipped.add(OTHER, [_relative(p, path) for p in found if not p.endswith(".parquet")])
        return path, [p for p in found if p.endswith(".parquet")], skipped
    if not any(c in path for c in _MAGIC):
        return None
    root = posixpath.dirname(path[: min(path.index(c) for c in _MAGIC if c in path)])
    return root, *_match(fs, root, path, local)


def _find(fs: AbstractFileSystem, root: str, local: bool) -> tuple[list[str], _Skipped]:
    """All files under ``root``, records left out."""
    if local:
        return _walk(root, None, _RECORDS)
    return _without_records(fs.find(root), root, _RECORDS)


def _match(fs: AbstractFileSystem, root: str, glob: str, local: bool) -> tuple[list[str], _Skipped]:
    """The files that ``glob`` matches, which has its first wildcard under ``root``, records left out."""
    pattern = _relative(glob, root)
    # A glob that itself begins a name with an underscore asks for such.
    records = _DOTTED if "/_" in f"/{pattern}" else _RECORDS
    if not local:
        found = fs.glob(glob, detail=True)
        return _without_records([path for path, info in found.items() if info["type"] == "file"], root, records)
    if not os.path.isdir(root):
        return [], _Skipped()
    depth = None if "**" in pattern else pattern.count("/") + 1
    wanted = re.compile(glob_translate(glob))
    return _walk(root, depth, records, wanted)


def _without_records(paths: Iterable[str], root: str, records: re.Pattern[str]) -> tuple[list[str], _Skipped]:
    found, skipped = [], _Skipped()
    for path in paths:
        names = _relative(path, root).split("/")
        hidden = next((i for i, name in enumerate(names) if records.match(name)), None)
        if hidden is None:
            found.append(path)
        else:
            skipped.add(HIDDEN, ["/".join(names[: hidden + 1]) + "/" * (hidden < len(names) - 1)])
    return found, skipped


def _walk(
    root: str, depth: int | None, records: re.Pattern[str], wanted: re.Pattern[str] | None = None
) -> tuple[list[str], _Skipped]:
    """Local files under ``root``, at most ``depth`` names below it, of which the paths match ``wanted``; records left out.

    Links to folders come after all folders: one that has been entered under its own name is not entered again.
    """
    files, skipped, seen = [], _Skipped(), set[str]()
    folders, links = [""], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(posixpath.join(root, folder))
        if real in seen:
            skipped.add(AGAIN, [f"{folder}/"])
            continue
        seen.add(real)
        with os.scandir(posixpath.join(root, folder)) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = posixpath.join(folder, entry.name)
            path, enters = posixpath.join(root, name), depth is None or name.count("/") + 1 < depth
            is_folder, asked = os.path.isdir(path), wanted is None or wanted.match(path)
            if records.match(entry.name):
                if enters if is_folder else asked:
                    skipped.add(HIDDEN, [name + "/" * is_folder])
            elif is_folder:
                if enters:
                    (links if entry.is_symlink() else folders).append(name)
            elif os.path.isfile(path) or entry.is_symlink():
                # A link to nothing is a shard that is missing.
                if asked:
                    files.append(path)
            else:
                skipped.add(OTHER, [name])
    return files, skipped
