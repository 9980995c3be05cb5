from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Storage


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


def test_options_stay_out_of_sight() -> None:
    assert "hush" not in repr(Storage("s3://bucket", {"secret": "hush"}))


def test_a_home_folder_is_meant_wherever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration file has been through no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/answers").open()[1] == f"{tmp_path}/answers"
    assert Storage("./~").open()[1] == str(Path.cwd() / "~")
