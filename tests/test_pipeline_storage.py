from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Storage, split_input, without


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.parquet", "b/c d.parquet", "b/.run/x.parquet", ".hidden/y.parquet", "b/notes.txt", "z[1].parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "root", "names"),
    [
        ("", "", ["a.parquet", "b/c d.parquet", "z[1].parquet"]),
        ("/", "", ["a.parquet", "b/c d.parquet", "z[1].parquet"]),
        ("/a.parquet", "", ["a.parquet"]),
        ("/z[1].parquet", "", ["z[1].parquet"]),
        ("/*.parquet", "", ["a.parquet", "z[1].parquet"]),
        ("/**/*.parquet", "", ["a.parquet", "b/c d.parquet", "z[1].parquet"]),
        ("/b/c*", "/b", ["c d.parquet"]),
    ],
)
def test_inputs(tree: Path, pattern: str, root: str, names: list[str]) -> None:
    found, listed = split_input(f"{tree}{pattern}", {})
    assert found.open()[1] == f"{tree}{root}"
    assert listed == names


@pytest.mark.parametrize("pattern", ["/none", "/none*.parquet", "/b/.run"])
def test_nothing_found(tree: Path, pattern: str) -> None:
    (tree / "b/.run/x.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="input="):
        split_input(f"{tree}{pattern}", {})


def test_the_output_is_not_read_as_input(tree: Path) -> None:
    root, names = split_input(str(tree), {})
    assert without(names, root, Storage(f"{tree}/b")) == ["a.parquet", "z[1].parquet"]


def test_local_files_appear_whole(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    assert storage.names() == []
    storage.write("x.parquet", b"one", temporary=".run/unfinished")
    storage.write("x.parquet", b"two", temporary=".run/unfinished")
    assert storage.read("x.parquet") == b"two"
    assert storage.names() == [".run", "x.parquet"]
    assert storage.names(".run/unfinished") == []
    (tmp_path / "out/taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        storage.write("taken", b"three", temporary=".run/unfinished")
    assert storage.names(".run/unfinished") == []


def test_s3(s3: dict[str, Any]) -> None:
    storage = Storage("s3://bucket/some folder", s3)
    assert storage.names() == []
    storage.write("a b.parquet", b"one", temporary=".run/unfinished")
    storage.write(".run/units/x.json", b"{}", temporary=".run/unfinished")
    assert storage.read("a b.parquet") == b"one"
    assert storage.names() == [".run", "a b.parquet"]
    assert storage.names(".run/units") == ["x.json"]
    with pytest.raises(FileNotFoundError):
        storage.read("none")
    for url in ("s3://bucket/some folder", "s3://bucket/some folder/*.parquet", "s3://bucket/some folder/a b.parquet"):
        root, names = split_input(url, s3)
        assert names == ["a b.parquet"]
        assert root.url == "s3://bucket/some folder"
        assert root.read(names[0]) == b"one"


def test_options_stay_out_of_sight() -> None:
    assert "hush" not in repr(Storage("s3://bucket", {"secret": "hush"}))
