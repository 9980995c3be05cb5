"""Files, local or on S3, behind one small class: read, and write a file that appears whole or not at all."""

from __future__ import annotations

import os
import posixpath
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from pipeline import retries

T = TypeVar("T")

PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class Storage:
    """A root on a filesystem. Picklable: the filesystem is opened by each process for itself.

    Paths given to the methods are relative to ``url``, with forward slashes.
    """

    url: str
    """Root folder: a local path or a URL of any scheme that fsspec knows."""

    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Arguments of the filesystem (keys, endpoint); they may hold secrets, hence no repr."""

    patience: float = 10.0
    """Seconds for which a store that is out of order is asked again."""

    def patient(self) -> Storage:
        """The same, for a run that has begun: it outlives a store's bad minutes."""
        return replace(self, patience=PATIENCE)

    def patiently(self, call: Callable[[], T]) -> T:
        """``call()``, which uses this store, asked again as long as ``patience`` lasts."""
        return retries.patiently(call, self.patience)

    def open(self) -> tuple[AbstractFileSystem, str]:
        """The filesystem and the root's path on it. fsspec hands every caller of a process the same instance."""
        fs, root = filesystem(self.url, self.options)
        return fs, root.rstrip("/") or "/"

    @property
    def local(self) -> bool:
        return is_local(self.url)

    def path(self, name: str) -> str:
        """``name`` as a path on the filesystem."""
        return posixpath.join(self.open()[1], name)

    def names(self, folder: str = "") -> list[str]:
        """Names directly under ``folder``, sorted; none where the folder is missing."""
        fs, root = self.open()
        path = posixpath.join(root, folder) if folder else root
        try:
            found = self.patiently(lambda: fs.ls(path, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({posixpath.basename(p.rstrip("/")) for p in found} - {""})

    def exists(self, name: str) -> bool:
        """Whether there is a file ``name``."""
        fs, _ = self.open()
        return bool(self.patiently(lambda: fs.isfile(self.path(name))))

    def read(self, name: str) -> bytes:
        """The whole file. Raises ``FileNotFoundError``."""
        fs, _ = self.open()
        data: bytes = self.patiently(lambda: fs.cat_file(self.path(name)))
        return data

    def write(self, name: str, data: bytes, temporary: str) -> None:
        """Writes ``name`` whole: by one PUT on an object store, else beside ``temporary`` (a folder) and moved into place."""
        fs, root = self.open()
        if not self.local:
            self.patiently(lambda: fs.pipe_file(self.path(name), data))
            return
        unfinished = f"{root}/{temporary}/{uuid.uuid4().hex}"
        os.makedirs(os.path.dirname(unfinished), exist_ok=True)
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path(name))
        finally:
            if os.path.exists(unfinished):
                os.remove(unfinished)

    def remove(self, *names: str) -> None:
        """Deletes files, in order but for a few at a time; they may be gone already."""
        fs, _ = self.open()

        def one(name: str) -> None:
            with suppress(FileNotFoundError):
                self.patiently(lambda: fs.rm_file(self.path(name)))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, names))


_lock = threading.Lock()


def filesystem(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    """fsspec's filesystem for ``url`` and the path on it; local paths come out absolute, ``~`` as the home folder.

    Options that come from a file or from Python have been through no shell.
    """
    if is_local(url):
        path = url.removeprefix("file://")
        return url_to_fs(os.path.abspath(path if path != url else os.path.expanduser(url)))
    # Listings are never cached: a run reads what other processes have just written. Nothing is read ahead: Arrow asks for what
    # it needs, and s3fs's 50 MB would fetch a whole shard for its footer's or its ids' sake.
    ahead = {"default_cache_type": "none"} if url.startswith(("s3:", "s3a:")) else {}
    with _lock:
        return url_to_fs(url, **{"use_listings_cache": False, **ahead, **options})


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")
