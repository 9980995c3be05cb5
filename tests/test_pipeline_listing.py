"""What an input's listing takes, and what it leaves out and says so."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import listing
from pipeline.listing import AGAIN, HIDDEN, OTHER, OUTPUT, list_input
from pipeline.storage import Storage

NAMES = (
    "a.parquet",
    "b/c d.parquet",
    "b/.run/x.parquet",
    ".hidden/y.parquet",
    "b/notes.txt",
    "z[1].parquet",
    "_SUCCESS",
    "_temporary/0/w.parquet",
    "_year=2024/v.parquet",
    "b/_c.parquet",
)


@pytest.fixture(params=["local", "s3"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, s3: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An input's address and its store's options."""
    if request.param == "local":
        for name in NAMES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return str(tmp_path), {}
    root = f"bucket/{tmp_path.name}"
    fs = fsspec.filesystem("s3", **s3)
    for name in NAMES:
        fs.pipe_file(f"{root}/{name}", b"x")
    return f"s3://{root}", s3


@pytest.mark.parametrize(
    ("pattern", "root", "names"),
    [
        ("", "", ["_year=2024/v.parquet", "a.parquet", "b/c d.parquet", "z[1].parquet"]),
        ("/", "", ["_year=2024/v.parquet", "a.parquet", "b/c d.parquet", "z[1].parquet"]),
        ("/a.parquet", "", ["a.parquet"]),
        ("/b/_c.parquet", "/b", ["_c.parquet"]),
        ("/z[1].parquet", "", ["z[1].parquet"]),
        ("/*.parquet", "", ["a.parquet", "z[1].parquet"]),
        ("/*a*", "", ["a.parquet", "z[1].parquet"]),
        ("/?.parquet", "", ["a.parquet"]),
        ("/*/*.parquet", "", ["_year=2024/v.parquet", "b/c d.parquet"]),
        ("/**/*.parquet", "", ["_year=2024/v.parquet", "a.parquet", "b/c d.parquet", "z[1].parquet"]),
        ("/b/c*", "/b", ["c d.parquet"]),
        ("/b/_*", "/b", ["_c.parquet"]),
    ],
)
def test_inputs(tree: tuple[str, dict[str, Any]], pattern: str, root: str, names: list[str]) -> None:
    url, options = tree
    found = list_input(f"{url}{pattern}", options)
    assert found.root.url == f"{url}{root}"
    assert found.names == names
    assert all(found.root.read(name) == b"x" for name in found.names)


def test_what_is_left_out_is_told(tree: tuple[str, dict[str, Any]]) -> None:
    url, options = tree
    found = list_input(url, options)
    assert found.skipped == {
        HIDDEN: [".hidden/", "_SUCCESS", "_temporary/", "b/.run/", "b/_c.parquet"],
        OTHER: ["b/notes.txt"],
    }
    assert "5 named like records, with . or _ in front (.hidden/, _SUCCESS, _temporary/, …); 1 not named" in listing.describe(
        found.skipped
    )
    # A glob that does not mean them has nothing to say of them.
    assert list_input(f"{url}/a*", options).skipped == {}
    assert list_input(f"{url}/*", options).skipped == {HIDDEN: ["_SUCCESS"]}


@pytest.mark.parametrize("pattern", ["/none", "/none*.parquet", "/b/.run", "/_temporary*"])
def test_nothing_found(tree: tuple[str, dict[str, Any]], pattern: str) -> None:
    url, options = tree
    fs, path = Storage(url, options).open()
    fs.rm_file(f"{path}/b/.run/x.parquet")
    with pytest.raises(FileNotFoundError, match="input="):
        list_input(f"{url}{pattern}", options)


class Forbidding(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_refuses_says_what_it_was_asked(s3: dict[str, Any]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match=r"^input='s3://bucket/x/\*' can't be listed \(PermissionError: .+\)$"):
            list_input("s3://bucket/x/*", s3 | {"endpoint_url": f"http://127.0.0.1:{server.server_port}"})
        server.shutdown()


def test_a_folder_of_records_alone_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "_x.parquet").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"holds no parquet file; skipped 1 named like records.*\(_x\.parquet\)"):
        list_input(str(tmp_path), {})


def test_the_output_is_not_read_as_input(tree: tuple[str, dict[str, Any]]) -> None:
    url, options = tree
    found = list_input(url, options).without(Storage(f"{url}/b", options))
    assert found.names == ["_year=2024/v.parquet", "a.parquet", "z[1].parquet"]
    assert found.skipped[OUTPUT] == ["b/c d.parquet"]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An input with shards in a folder elsewhere, links that come back, and a link to a single shard."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "in"
    for folder in (elsewhere / "deep", root / "real"):
        folder.mkdir(parents=True)
        (folder / "x.parquet").write_bytes(b"x")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "also real").symlink_to(root / "real", target_is_directory=True)
    (elsewhere / "deep/around").symlink_to(root, target_is_directory=True)
    (root / "real/y.parquet").symlink_to(elsewhere / "deep/x.parquet")
    return root


def test_an_output_behind_a_link_is_no_input(linked: Path) -> None:
    elsewhere = linked.parent / "elsewhere"
    (linked / "real/y.parquet").unlink()
    for output in (elsewhere, linked / "linked"):
        assert list_input(str(linked), {}).without(Storage(str(output))).names == ["real/x.parquet"]
    (linked.parent / "input").symlink_to(linked)
    assert list_input(f"{linked.parent}/input", {}).without(Storage(f"{linked}/real")).names == ["linked/deep/x.parquet"]


@pytest.mark.parametrize("pattern", ["", "/**/*.parquet", "/**"])
def test_folders_are_read_through_links_and_once(linked: Path, pattern: str) -> None:
    found = list_input(f"{linked}{pattern}", {})
    assert found.names == ["linked/deep/x.parquet", "real/x.parquet", "real/y.parquet"]
    assert found.skipped == {AGAIN: ["also real/", "linked/deep/around/"]}


def test_a_glob_names_folders_through_links(linked: Path) -> None:
    assert list_input(f"{linked}/*/*/x.parquet", {}).names == ["linked/deep/x.parquet"]
    assert list_input(f"{linked}/linked/*/*.parquet", {}).names == ["deep/x.parquet"]


def test_a_link_to_nothing_is_a_shard_that_is_missing(tmp_path: Path) -> None:
    """Not one that is passed over."""
    (tmp_path / "x.parquet").symlink_to(tmp_path / "gone")
    (tmp_path / "y").symlink_to(tmp_path / "y")
    found = list_input(str(tmp_path), {})
    assert found.names == ["x.parquet"]
    assert found.skipped == {OTHER: ["y"]}


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.parquet")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the file name .*caf\\udce9\.parquet is not UTF-8.*rename it") as caught:
        list_input(str(tmp_path), {})
    str(caught.value).encode()


def test_an_empty_name_in_a_key_is_told(s3: dict[str, Any], tmp_path: Path) -> None:
    fsspec.filesystem("s3", **s3).pipe_file(f"bucket/{tmp_path.name}/a//b.parquet", b"x")
    for pattern in ("", "/**", "/a//b.parquet"):
        with pytest.raises(ValueError, match=r"the key '.*//b\.parquet' has an empty name between two slashes"):
            list_input(f"s3://bucket/{tmp_path.name}{pattern}", s3)
