"""Runs as their folders tell them, and how they are joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_folders import write_run

from jobs.comparison import joins
from jobs.comparison import runs as reading
from jobs.comparison.joins import joined
from jobs.comparison.runs import read_run, read_runs
from pipeline.storage import Storage


def rows(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"id": name, "text": f"text {name}", **more} for name in names]


def read(folder: Path, name: str = "") -> reading.Run:
    return read_run(Storage(str(folder)), name)


def column(run: reading.Run, name: str) -> list[Any]:
    return [value for table in run.rows([name]) for value in table[name].to_pylist()]


def test_a_run_is_what_its_finished_units_hold(tmp_path: Path) -> None:
    given = [*rows("a", "b", "c", "d"), *rows("e", error="broken"), *rows("f", "g", "h", "i")]
    write_run(tmp_path, given, unit_rows=4, unfinished=1, config={"policy": "trimmed-llama", "k_ratio": 0.5})
    # As after a kill: a file without its marker.
    (tmp_path / "stray-0123456789-0000000-0000004.parquet").write_bytes(b"half")
    run = read(tmp_path)
    assert column(run, "id") == list("abcdefgh")
    assert (run.stats["rows"], run.stats["errors"], run.answered) == (8, 1, 7)
    assert (run.units, len(run.finished), run.complete) == (3, 2, False)
    assert (run.policy, run.options, run.max_tiles) == ("trimmed-llama", {"k_ratio": 0.5}, None)
    assert run.device_seconds == {"CPU, 2 threads": 4.0}
    assert run.untimed == 0


def test_rows_come_by_column_and_in_order_however_many_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_ROWS", 7)
    names = [f"{i:03d}" for i in range(100)]
    write_run(tmp_path, rows(*names, answer="x"), unit_rows=2)
    run = read(tmp_path)
    tables = list(run.rows(["answer", "id"]))
    assert [len(t) for t in tables] == [8] * 12 + [4]
    assert tables[0].column_names == ["answer", "id"]
    assert column(run, "id") == names


def test_partitions_are_one_run(tmp_path: Path) -> None:
    write_run(tmp_path, rows("a", "b"), partition=(1, 3))
    write_run(tmp_path, rows("c"), partition=(3, 3))
    run = read(tmp_path)
    assert sorted(column(run, "id")) == ["a", "b", "c"]
    # The second partition has not begun, and nothing tells how many units it has.
    assert (run.partitions, len(run.records), run.units, run.complete) == (3, 2, 2, False)
    write_run(tmp_path, rows("d"), partition=(2, 3))
    assert read(tmp_path).complete


def test_gpu_seconds_are_the_actors_times_their_gpus(tmp_path: Path) -> None:
    write_run(tmp_path / "half", rows(*"abcde"), device="NVIDIA H200", stats={"gpus": 0.5, "actor_seconds": 10.0})
    assert read(tmp_path / "half").device_seconds == {"NVIDIA H200": 10.0}
    # Before actors were timed, what the device did stands for them.
    older = {"gpus": None, "actor_seconds": None}
    write_run(
        tmp_path / "old", rows(*"abcde"), stats=older, seconds={"decode_images": 50, "tower": 1, "prefill": 2, "decode": 3}
    )
    run = read(tmp_path / "old")
    assert run.device_seconds == {"CPU, 2 threads": 12.0}
    assert run.untimed == 2


def test_names_say_what_is_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "full", rows("a"))
    write_run(tmp_path / "again", rows("a"))
    write_run(tmp_path / "tiles", rows("a"), config={"max_tiles": 1})
    write_run(tmp_path / "k=0.25", rows("a"), config={"policy": "trimmed-llama", "k_ratio": 0.25})
    folders = [str(tmp_path / name) for name in ("k=0.25", "tiles", "again")]
    found = read_runs([f"mine={folders[0]}", *folders[1:]], str(tmp_path / "full"), {})
    assert [run.name for run in found] == ["none (full)", "mine", "none max_tiles=1", "none (again)"]
    write_run(tmp_path / "tower", rows("a"), config={"tower_policy": "alike"})
    assert read_runs([str(tmp_path / "tower")], folders[1], {})[1].name == "none tower_policy=alike tower_keep=0.5"
    write_run(tmp_path / "padding", rows("a"), config={"tower_tiles": "all"})
    assert read_runs([str(tmp_path / "padding")], folders[1], {})[1].name == "none tower_tiles=all"
    # A path with an equals sign is no name.
    found = read_runs([folders[0], folders[1]], folders[1] + "/", {})
    assert [run.name for run in found] == ["none max_tiles=1", "trimmed-llama k_ratio=0.25"]
    found = read_runs([f"a={folders[0]}", f"b={folders[1]}"], "b", {})
    assert [run.name for run in found] == ["b", "a"]


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rows("a"))
    write_run(tmp_path / "b", rows("a"))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def refused(given: list[str], baseline: str, said: str) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            read_runs(given, baseline, {})
        assert "\n" not in str(caught.value)

    refused([a, str(tmp_path / "none")], a, "holds no run")
    refused([a, a], b, "given twice")
    refused([a], a, "only the baseline")
    refused([f"x={a}", f"x={b}"], a, "two runs are named 'x'")
    refused([a, b], "other", "baseline='other' is neither a folder nor one of the runs")
    refused([a, f"={b}"], a, "neither a folder nor NAME=FOLDER")
    write_run(tmp_path / "begun", rows("a"), unfinished=1)
    refused([a, str(tmp_path / "begun")], a, "no finished rows yet")

    file = next((tmp_path / "b").glob("*.parquet"))
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    refused([a, b], a, "unreadable shard-")
    file.write_bytes(whole)
    marker = next((tmp_path / "b/.run/units").iterdir())
    marker.write_text('{"rows": 1}')
    refused([a, b], a, "unreadable marker")
    (tmp_path / "b/.run/run.json").write_text('{"config": {}}')
    refused([a, b], a, r"unreadable \.run/run\.json")


def test_partitions_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, rows("a"), partition=(1, 2))
    write_run(tmp_path, rows("b"), partition=(2, 2), input_digest="other")
    with pytest.raises(ValueError, match="partitions of different runs"):
        read(tmp_path)


@pytest.mark.parametrize("held", [500_000, 3])
def test_a_join_is_the_same_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(joins, "JOIN_ROWS", held)
    write_run(tmp_path / "a", rows(*(f"{i}" for i in range(40)), answer=["x", "y"]))
    write_run(tmp_path / "b", rows(*(f"{i}" for i in range(59, 19, -1))), unit_rows=7)
    sides = [read(tmp_path / "a", "a"), read(tmp_path / "b", "b")]
    tables = list(joined(sides, [["text", "answer"], ["text"]]))
    assert len(tables) == (14 if held == 3 else 1)
    assert all(len(t) < 12 for t in tables) or held > 3
    table = pa.concat_tables(tables).sort_by("id")
    assert table.column_names == ["id", "0.text", "0.answer", "1.text"]
    assert table["id"].to_pylist() == sorted(str(i) for i in range(20, 40))
    assert table["0.text"] == table["1.text"]
    assert table["0.text"].to_pylist() == [f"text {id}" for id in table["id"].to_pylist()]


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rows("a", "b"))
    write_run(tmp_path / "b", rows("a", "b", "b"))
    with pytest.raises(ValueError, match="run 'b' has two rows with the id 'b'"):
        list(joined([read(tmp_path / "a", "a"), read(tmp_path / "b", "b")], [["text"], ["text"]]))


def test_runs_on_s3(s3: dict[str, Any]) -> None:
    for name in ("none", "half"):
        write_run(Storage(f"s3://bucket/compared/{name}", s3), rows(*"abcdefg", answer="x"), unit_rows=2)
    found = read_runs(["half=s3://bucket/compared/half"], "s3://bucket/compared/none", s3)
    assert [run.name for run in found] == ["none", "half"]
    (table,) = joined(found, [["text"], ["answer"]])
    assert table["id"].to_pylist() == list("abcdefg")
    # What opens the store is in no text that a report could show.
    assert "a-secret-key" not in repr(found) + json.dumps(found[0].config)
