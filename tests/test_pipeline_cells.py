from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.cells import image_lists, resolve, strings
from pipeline.storage import Storage


def lists(values: list[Any], kind: pa.DataType, root: str = "/nowhere") -> list[list[dict[str, Any]]]:
    return image_lists(pa.chunked_array([values], kind), [Storage(root)], "shard.parquet").to_pylist()


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DATA = {"bytes": b"data", "error": None}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (pa.binary(), b"data", [DATA]),
        (pa.large_binary(), b"data", [DATA]),
        (pa.binary(), None, []),
        (STRUCT, {"bytes": b"data", "path": "/etc/passwd"}, [DATA]),
        (STRUCT, {"bytes": None, "path": None}, []),
        (STRUCT, None, []),
        (pa.list_(STRUCT), [{"bytes": b"data", "path": None}] * 2, [DATA, DATA]),
        (pa.list_(pa.binary()), [b"data"], [DATA]),
        (pa.list_(pa.binary()), [], []),
        (pa.list_(pa.binary()), None, []),
    ],
)
def test_every_shape_of_cell(kind: pa.DataType, value: Any, expected: list[dict[str, Any]]) -> None:
    assert lists([value], kind) == [expected]


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (pa.binary(), b"", "0 bytes"),
        (pa.string(), "", "path is empty"),
        (pa.string(), "none.png", "no such file"),
        (pa.list_(pa.binary()), [b"data", None], "image 2 of 2 is null"),
    ],
)
def test_images_that_cannot_be_had_carry_an_error(kind: pa.DataType, value: Any, said: str, tmp_path: Path) -> None:
    ((*_, last),) = lists([value], kind, str(tmp_path))
    assert last["bytes"] is None
    assert said in last["error"]


def test_paths_are_read_beside_the_shard_and_under_the_root(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    root = tmp_path / "in put"
    (root / "part/images").mkdir(parents=True)
    (root / "part/images/a b.png").write_bytes(picture())
    (root / "up.png").write_bytes(b"up")
    (tmp_path / "secret.png").write_bytes(b"secret")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    read = ["images/a b.png", "../up.png", f"{root}/up.png", f"file://{str(root).replace(' ', '%20')}/up.png"]
    kept = [
        "../../secret.png",
        "/etc/passwd",
        "../link.png",
        "file:///etc/passwd",
        "http://169.254.169.254/x",
        "s3://b/x",
        "a\0b",
    ]
    cells = image_lists(pa.chunked_array([read + kept]), [Storage(str(root))], "part/shard.parquet").to_pylist()
    assert [c[0]["bytes"] for c in cells[: len(read)]] == [picture(), b"up", b"up", b"up"]
    for cell in cells[len(read) :]:
        assert cell[0]["bytes"] is None
        assert "outside the folders where images are read" in cell[0]["error"]


def test_s3_paths(s3: dict[str, Any]) -> None:
    root = Storage("s3://bucket/cells", s3)
    root.write("images/a b+c%.png", b"png", temporary="")
    uris = [
        "images/a b+c%.png",
        "s3://bucket/cells/images/a b+c%.png",
        "../other.png",
        "s3://other/x.png",
        "/etc/passwd",
        "file:///etc/passwd",
    ]
    cells = image_lists(pa.chunked_array([uris]), [root], "shard.parquet").to_pylist()
    assert [c[0]["bytes"] for c in cells] == [b"png", b"png", None, None, None, None]
    assert "no such file" in cells[4][0]["error"]  # under the root, like any key
    assert "outside" in cells[5][0]["error"]
    with pytest.raises(ValueError, match="outside"):
        resolve("s3://bucket/cells/../x.png", [root], "shard.parquet")


def test_one_store_has_several_schemes_and_keys_their_own_slashes(s3: dict[str, Any]) -> None:
    fs = Storage("s3://bucket/schemes", s3).open()[0]
    for key, content in {"a.png": b"a", "b//c.png": b"c", "b/c.png": b"one slash"}.items():
        fs.pipe_file(f"bucket/schemes/{key}", content)
    asked = {"a.png": b"a", "b//c.png": b"c", "b/c.png": b"one slash", "x/../b//./c.png": b"c"}
    for url in ("s3://bucket/schemes", "s3a://bucket/schemes"):
        for scheme in ("s3", "s3a"):
            uris = [f"{scheme}://bucket/schemes/{key}" for key in asked]
            cells = image_lists(pa.array([*uris, *asked]), [Storage(url, s3)], "shard.parquet").to_pylist()
            assert [cell[0]["bytes"] for cell in cells] == [*asked.values()] * 2
    for uri in ("s3a://bucket/schemes/../x.png", "gs://bucket/schemes/a.png"):
        with pytest.raises(ValueError, match="outside"):
            resolve(uri, [Storage("s3://bucket/schemes", s3)], "shard.parquet")


def test_strings_that_are_not_utf8() -> None:
    raw = pa.array([b"fine", b"\xff\xfe", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers(), raw.null_count)
    assert strings(pa.chunked_array([broken])) == ["fine", None, None]
    assert strings(pa.array([1, None])) == ["1", None]
    assert strings(pa.array(["a", "b", "a"]).dictionary_encode()) == ["a", "b", "a"]


def test_other_roots_are_read_where_they_are_named(tmp_path: Path, s3: dict[str, Any]) -> None:
    for folder in ("in", "photos", "private"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(folder.encode())
    bucket = Storage("s3://bucket/other photos", s3)
    bucket.write("y.png", b"from the bucket", temporary="")
    roots = [Storage(str(tmp_path / "in")), Storage(str(tmp_path / "photos")), bucket]
    uris = [
        "x.png",
        f"{tmp_path}/photos/x.png",
        f"file://{tmp_path}/photos/x.png",
        "s3://bucket/other photos/y.png",
        f"{tmp_path}/private/x.png",
        f"{tmp_path}/photos/../private/x.png",
        "s3://bucket/secret/y.png",
        "s3://elsewhere/other photos/y.png",
        "http://169.254.169.254/latest/meta-data/iam",
    ]
    cells = image_lists(pa.array(uris), roots, "shard.parquet").to_pylist()
    assert [cell[0]["bytes"] for cell in cells] == [b"in", b"photos", b"photos", b"from the bucket", *[None] * 5]
    assert all("outside the folders where images are read" in cell[0]["error"] for cell in cells[4:])


def test_a_path_that_is_no_text_is_this_rows_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    raw = pa.array([b"x.png", b"\xff\xfe", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    cells = image_lists(broken, [Storage(str(tmp_path))], "shard.parquet").to_pylist()
    assert cells[0][0]["bytes"] == b"x"
    assert cells[1][0]["error"] == "the image's path is not UTF-8"
    assert cells[2] == []
