"""From an image cell, whatever its type, to image files' bytes. URIs are read only under roots that the user named."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from pipeline import schema
from pipeline.retries import transient
from pipeline.storage import Storage

FETCHES = 16
"""Image files read at once by one read task."""
MAX_BYTES = 200 * 2**20
"""A larger image file is an error: under 20 megapixels nothing real comes near."""


def image_lists(cells: pa.ChunkedArray | pa.Array, roots: Sequence[Storage], shard: str) -> pa.Array:
    """Each cell as a list of ``schema.IMAGE_TYPE``: null and empty cells as an empty list, several images in their order.

    ``shard`` is the shard's name under the first of ``roots``: relative paths are looked up beside it. An image that cannot be
    had carries an error instead of bytes. Raises what a store raises that is out of order.
    """
    values = [_members(cell) for cell in _values(cells)]
    fetched: dict[str, dict[str, Any]] = {}
    wanted = {member for members in values for member in members if isinstance(member, str)}
    if wanted:
        with ThreadPoolExecutor(FETCHES) as pool:
            fetched = dict(zip(wanted, pool.map(lambda uri: _fetch(uri, roots, shard), wanted), strict=True))
    rows = [[fetched[m] if isinstance(m, str) else m for m in members] for members in values]
    return pa.array(rows, type=pa.large_list(schema.IMAGE_TYPE))


def _values(cells: pa.ChunkedArray | pa.Array) -> list[Any]:
    try:
        values: list[Any] = cells.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_value(cell) for cell in cells]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def _members(cell: Any) -> list[str | dict[str, Any]]:
    if isinstance(cell, UnicodeDecodeError):
        return [_failed("the image's path is not UTF-8")]
    if not isinstance(cell, list):
        member = _member(cell)
        return [] if member is None else [member]
    members = [_member(item) for item in cell]
    return [_failed(f"image {i + 1} of {len(members)} is null") if m is None else m for i, m in enumerate(members)]


def _member(item: Any) -> str | dict[str, Any] | None:
    """A URI still to be read, an image, or None for null."""
    if isinstance(item, dict):
        # Where both are there the bytes are the image, and the path is only what it was called.
        content = item.get("bytes")
        item = content if content is not None else item.get("path")
    if isinstance(item, str):
        return item if item else _failed("the image's path is empty")
    if item is None:
        return None
    if isinstance(item, bytes):
        return {"bytes": item, "error": None} if item else _failed("the image is empty (0 bytes)")
    return _failed(f"an image cannot be a {type(item).__name__}")


def _failed(error: str) -> dict[str, Any]:
    return {"bytes": None, "error": error}


def _fetch(uri: str, roots: Sequence[Storage], shard: str) -> dict[str, Any]:
    try:
        root, path = resolve(uri, roots, shard)
        fs, _ = root.open()
        size = root.patiently(lambda: fs.size(path))
        if size is not None and size > MAX_BYTES:
            return _failed(f"{uri}: {size} bytes are too many for an image (at most {MAX_BYTES})")
        data = root.patiently(lambda: fs.cat_file(path))
        return {"bytes": data, "error": None} if data else _failed(f"{uri}: the image is empty (0 bytes)")
    except FileNotFoundError:
        return _failed(f"{uri}: no such file")
    except ValueError as error:
        return _failed(str(error))
    except Exception as error:
        # A store that does not answer ends the run, which can be continued; whatever else it says, the row carries.
        if transient(error):
            raise
        return _failed(f"{uri}: {type(error).__name__}: {error}")


def resolve(uri: str, roots: Sequence[Storage], shard: str) -> tuple[Storage, str]:
    """Which of ``roots`` holds ``uri``, and its path there; ``shard`` lies in the first, and relative paths start beside it.

    A shard's writer may not make the cluster read what its user did not point it at, so only what lies under a root is read,
    after ``..`` and symbolic links are followed. Raises ``ValueError`` for anything else.
    """
    for root in roots if "\0" not in uri else ():
        path = _path(uri, root, roots[0].path(shard) if root is roots[0] else None)
        if path is None:
            continue
        real: Callable[[str], str] = os.path.realpath if root.local else _normal
        if real(path).startswith(real(root.open()[1]).rstrip("/") + "/"):
            return root, real(path)
    raise ValueError(f"{uri}: outside the folders where images are read (the input's own, and image_roots)")


def _path(uri: str, root: Storage, shard: str | None) -> str | None:
    """``uri`` as a path on the root's filesystem; None where it is on another. Without ``shard`` nothing is relative."""
    if "://" not in uri:
        if root.local and uri.startswith("/"):
            return uri
        return posixpath.join(posixpath.dirname(shard), uri.lstrip("/")) if shard else None
    if root.local:
        parts = urlsplit(uri)
        return unquote(parts.path) if parts.scheme == "file" and parts.netloc in ("", "localhost") else None
    fs, _ = root.open()
    # s3 and s3a, or gs and gcs, are one filesystem.
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    scheme, path = uri.split("://", 1)
    return path if scheme in protocols else None


def _normal(key: str) -> str:
    """``key`` of an object store without ``.`` and ``..``; an empty name between two slashes is one of its names."""
    names: list[str] = []
    for name in key.split("/"):
        if name == "..":
            del names[-1:]
        elif name != ".":
            names.append(name)
    return "/".join(names)


def strings(column: pa.ChunkedArray | pa.Array) -> Sequence[str | None]:
    """Values as strings; a value that is not valid UTF-8 as None."""
    try:
        values: list[str | None] = column.cast(pa.large_string()).to_pylist()
        return values
    except (pa.ArrowInvalid, UnicodeDecodeError):
        raw = column.cast(pa.large_string(), safe=False).cast(pa.large_binary()).to_pylist()
        return [_decoded(value) for value in raw]


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
