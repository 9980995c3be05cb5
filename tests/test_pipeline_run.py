"""Whole runs on a local Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import skimage
import sklearn

from pipeline import graph
from pipeline.cluster import fitted
from pipeline.plan import make_plan
from pipeline.record import RefusalError
from pipeline.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def shards(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """30 rows in two shards: one of structs with an id, one all of whose images are broken."""
    folder = tmp_path / "in"
    (folder / "part").mkdir(parents=True)
    cells = [{"bytes": picture(60 + 20 * (i % 9), 80, seed=i), "path": None} for i in range(20)]
    good = pa.table({"image": cells, "question": ["how many"] * 20, "id": range(20), "answer": ["x"] * 20, "text": ["t"] * 20})
    pq.write_table(good, folder / "a.parquet", row_group_size=5)
    bad = pa.table({"image": [b"broken"] * 10, "question": ["how many"] * 10, "id": range(100, 110), "note": pa.nulls(10)})
    pq.write_table(bad, folder / "part/b.parquet")
    return folder


def read(folder: Path | str) -> pa.Table:
    return pq.read_table(folder).sort_by("id")


def test_no_row_is_lost_and_every_reader_opens_the_folder(config: Any, shards: Path, tmp_path: Path, capfd: Any) -> None:
    import duckdb
    import pandas as pd
    from datasets import load_dataset

    out = tmp_path / "out"
    plan = make_plan(config(input=str(shards), output=str(out), unit_rows=10, batch_size=4, write_kept=True))
    assert not out.exists()
    summary = graph.run(plan)
    assert (summary["rows"], summary["errors"], summary["units"]) == (30, 10, 3)
    assert summary["judged"] == 20

    table = pq.read_table(out)
    assert sorted(table["id"].to_pylist()) == sorted([str(i) for i in range(20)] + [str(i) for i in range(100, 110)])
    assert table.column_names[:4] == ["question", "answer", "input_text", "note"]
    # All units have one schema, the one whose every row failed too.
    files = sorted(out.glob("*.parquet"))
    assert len(files) == 3
    assert all(pq.read_schema(f) == plan.columns.output(write_kept=True) for f in files)
    failed = [r for r in table.to_pylist() if r["error"]]
    assert {r["id"] for r in failed} == {str(i) for i in range(100, 110)}

    names = set(table.column_names)
    assert set(pd.read_parquet(out).columns) == names
    assert len(pd.read_parquet(out)) == 30
    loaded = load_dataset("parquet", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert (len(loaded), set(loaded.column_names)) == (30, names)
    relation = duckdb.sql(f"select * from '{out}/*.parquet'")
    assert set(relation.columns) == names
    assert duckdb.sql(f"select count(*), count(text), count(error) from '{out}/*.parquet'").fetchall() == [(30, 20, 10)]

    # All that is no data lies in the dotted folder.
    assert {p.name for p in out.iterdir() if p.suffix != ".parquet"} == {".run"}
    assert sorted(p.name for p in (out / ".run").iterdir()) == ["lock", "run.json", "summary.json", "unfinished", "units"]
    run = json.loads((out / ".run/run.json").read_text())
    assert run["config"]["policy"] == "trimmed-llama"
    assert run["config"]["k_ratio"] == 0.25
    assert run["versions"]["ray"]
    assert json.loads((out / ".run/summary.json").read_text()) == summary
    assert {"device", "seconds_per_stage", "prompt_tokens", "output_tokens", "peak_memory_bytes"} <= set(summary)


def test_starting_again_continues(config: Any, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {"input": str(shards), "output": str(out), "unit_rows": 5}
    graph.run(make_plan(config(**settings)))
    before = read(out)
    times = {p: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    assert len(times) == 6

    plan = make_plan(config(**settings))
    assert plan.remaining == []
    first = graph.run(plan)
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.parquet")} == times

    # As after a kill: a file that was never written, one without its marker, no summary.
    lost, unmarked = sorted(times)[1], sorted(times)[2]
    lost.unlink()
    (out / f".run/units/{unmarked.stem}.json").unlink()
    (out / ".run/summary.json").unlink()
    # What does not decide an answer may differ.
    plan = make_plan(config(**settings, batch_size=2))
    assert {u.name for u in plan.remaining} == {lost.stem, unmarked.stem}
    second = graph.run(plan)
    assert second["rows_this_start"] == 10
    changed = {p for p in out.glob("*.parquet") if p.stat().st_mtime_ns != times[p]}
    assert changed == {lost, unmarked}
    assert read(out) == before
    # Every unit's time counts once, whichever start did it; of the two that were done again, the later one's.
    markers = [json.loads(path.read_text()) for path in (out / ".run/units").iterdir()]
    assert second["actor_seconds"] == pytest.approx(sum(m["actor_seconds"] for m in markers), abs=1e-3)
    assert 0 < first["actor_seconds"] < first["seconds_working"]
    assert second["gpu_seconds"] == 0
    assert [second[k] for k in ("rows", "errors", "output_tokens")] == [first[k] for k in ("rows", "errors", "output_tokens")]

    with pytest.raises(RefusalError, match=r"differs in k_ratio \(0\.25 there, 0\.5 here\)"):
        make_plan(config(**settings, k_ratio=0.5))
    with pytest.raises(RefusalError, match=r"differs in max_tiles \(None there, 2 here\)"):
        make_plan(config(**settings, max_tiles=2))
    with pytest.raises(RefusalError, match="differs in input"):
        make_plan(config(**{**settings, "input": f"{shards}/a.parquet"}))


def test_a_tile_an_image(config: Any, shards: Path, tmp_path: Path) -> None:
    settings = {"input": str(shards / "a.parquet"), "policy": "none"}
    full = graph.run(make_plan(config(**settings, output=str(tmp_path / "full"))))
    fewer = graph.run(make_plan(config(**settings, output=str(tmp_path / "fewer"), max_tiles=1)))
    rows = pq.read_table(tmp_path / "fewer")
    assert rows["tiles"] == rows["images"]
    assert fewer["tiles"] == fewer["images"] == full["images"] < full["tiles"]
    assert fewer["cross_kv_bytes_full"] * full["tiles"] == full["cross_kv_bytes_full"] * fewer["tiles"]
    assert json.loads((tmp_path / "fewer/.run/run.json").read_text())["decides"]["max_tiles"] == 1


def test_ids_follow_from_shard_and_row(config: Any, picture: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [picture()] * 6, "question": ["how many"] * 6}), tmp_path / f"in/{name}.parquet")
    found = {}
    for unit_rows in (2, 6):
        out = tmp_path / f"out{unit_rows}"
        graph.run(make_plan(config(input=f"{tmp_path}/in/*.parquet", output=str(out), unit_rows=unit_rows)))
        found[unit_rows] = read(out)["id"].to_pylist()
    assert found[2] == found[6]
    assert len(set(found[2])) == 12


def test_questions_about_one_image_stay_in_one_unit(config: Any, picture: Callable[..., bytes], tmp_path: Path) -> None:
    pictures = [picture(60, 80, seed=i) for i in range(6)]
    cells = [{"bytes": pictures[i // 5], "path": f"{i}.png"} for i in range(30)]
    questions = ["how many", "what is this", "describe this image.", "what image is this", "how is this"] * 6
    table = pa.table({"image": cells, "question": questions, "id": [f"{i:02d}" for i in range(30)]})
    pq.write_table(table, tmp_path / "in.parquet")
    out = tmp_path / "out"
    settings = {"input": str(tmp_path / "in.parquet"), "output": str(out), "unit_rows": 8, "write_kept": True}
    summary = graph.run(make_plan(config(**settings)))
    assert (summary["rows"], summary["errors"], summary["units"]) == (30, 0, 4)
    files = {path: pq.read_table(path) for path in sorted(out.glob("*.parquet"))}
    # Named by the nominal range, cut between images.
    assert [path.stem[-15:] for path in files] == ["0000000-0000007", "0000007-0000015", "0000015-0000022", "0000022-0000030"]
    assert [t.num_rows for t in files.values()] == [10, 5, 10, 5]
    rows = [row for t in files.values() for row in t.to_pylist()]
    assert [row["id"] for row in rows] == table["id"].to_pylist()
    # Which are so all that decide together.
    assert all(row["kept"] == rows[number // 5 * 5]["kept"] for number, row in enumerate(rows))

    # A unit that is done again ends where its neighbours, which are not, began.
    list(files)[1].unlink()
    (out / ".run/summary.json").unlink()
    assert graph.run(make_plan(config(**settings)))["rows"] == 30
    assert {path: pq.read_table(path) for path in sorted(out.glob("*.parquet"))} == files

    # Rows that no unit has are told, however well each unit went.
    marker = out / f".run/units/{list(files)[1].stem}.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"rows": 4}))
    (out / ".run/summary.json").unlink()
    with pytest.raises(ValueError, match="has 29 rows instead of 30"):
        graph.run(make_plan(config(**settings)))
    assert not (out / ".run/summary.json").exists()


def test_rows_of_an_image_that_row_groups_part_decide_in_each_unit(
    config: Any, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    """A row group's edge parts an image's rows 0 and 1 from 2 to 4: each unit decides, and again the same when done again."""
    questions = ["how many", "what is this", "describe this image.", "what image is this", "how is this"]
    table = pa.table({"image": [picture(60, 80)] * 5, "question": questions, "id": list("abcde")})
    pq.write_table(table, tmp_path / "in.parquet")
    with pq.ParquetWriter(tmp_path / "in.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 2))
        writer.write_table(table.slice(2))
    settings = {"input": str(tmp_path / "in.parquet"), "write_kept": True, "unit_rows": 3}
    graph.run(make_plan(config(**settings, output=str(tmp_path / "out"))))
    rows = read(tmp_path / "out")
    a, b, c, d, e = rows["kept"].to_pylist()
    assert a == b
    assert c == d == e
    assert a != c

    next(iter(sorted((tmp_path / "out").glob("*.parquet")))).unlink()
    (tmp_path / "out/.run/summary.json").unlink()
    graph.run(make_plan(config(**settings, output=str(tmp_path / "out"))))
    assert read(tmp_path / "out") == rows
    # In one unit all five decide together.
    pq.write_table(table, tmp_path / "in.parquet")
    graph.run(make_plan(config(**settings | {"unit_rows": 5}, output=str(tmp_path / "whole"))))
    assert len(set(map(tuple, read(tmp_path / "whole")["kept"].to_pylist()))) == 1
    with pytest.raises(RefusalError, match=r"differs in kept_sets \('image' there, 'question' here\)"):
        make_plan(config(**settings | {"unit_rows": 5}, output=str(tmp_path / "whole"), kept_sets="question"))


def test_paths_as_images(config: Any, picture: Callable[..., bytes], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        (folder / f"images/{i}.png").write_bytes(picture(seed=i))
    (tmp_path / "secret.png").write_bytes(picture())
    cells = [["images/0.png"], ["images/1.png", "images/2.png"], ["none.png"], ["../secret.png"], []]
    table = pa.table({"pictures": cells, "ask": ["how many"] * 5, "key": list("abcde")})
    pq.write_table(table, folder / "x.parquet")
    options = {"image_column": "pictures", "question_column": "ask", "id_column": "key"}
    graph.run(make_plan(config(input=str(folder / "x.parquet"), output=str(tmp_path / "out"), **options)))
    rows = read(tmp_path / "out").to_pylist()
    assert [r["images"] for r in rows] == [1, 2, 1, 1, 0]
    assert [r["error"] is None for r in rows] == [True, True, False, False, True]
    assert "outside the folders where images are read" in rows[3]["error"]


def test_limit_and_one_file(config: Any, shards: Path, tmp_path: Path) -> None:
    graph.run(make_plan(config(input=str(shards), output=str(tmp_path / "out"), limit=7, unit_rows=5)))
    assert sorted(map(int, read(tmp_path / "out")["id"].to_pylist())) == list(range(7))


def test_s3(config: Any, shards: Path, tmp_path: Path, s3: dict[str, Any]) -> None:
    root = Storage("s3://bucket/run/in put", s3)
    for path in shards.rglob("*.parquet"):
        root.write(str(path.relative_to(shards)), path.read_bytes(), temporary="")
    settings = {"input": "s3://bucket/run/in put", "output": "s3://bucket/run/out", "storage_options": s3, "unit_rows": 10}
    summary = graph.run(make_plan(config(**settings)))
    assert (summary["rows"], summary["errors"]) == (30, 10)
    output = Storage("s3://bucket/run/out", s3)
    fs, path = output.open()
    table = pq.read_table(path, filesystem=fs)
    local = tmp_path / "local"
    graph.run(make_plan(config(input=str(shards), output=str(local), unit_rows=10)))
    # Where the shards lie decides nothing: ids and file names follow from their paths below the input.
    assert table.sort_by("id") == read(local)
    assert [n for n in output.names() if n != ".run"] == sorted(p.name for p in local.glob("*.parquet"))
    assert output.names(".run/unfinished") == []
    files = [".run/run.json", ".run/summary.json", *(f".run/units/{name}" for name in output.names(".run/units"))]
    assert s3["secret"] not in "".join(output.read(name).decode() for name in files)
    # Nor in what Ray logs of a run's plan and its tasks.
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    assert not [file.name for file in logs.rglob("*") if file.is_file() and s3["secret"].encode() in file.read_bytes()]
    assert make_plan(config(**settings)).remaining == []


def test_real_photographs_and_broken_files_lose_no_row(config: Any, tmp_path: Path) -> None:
    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images"]
    files = [f for folder in folders for f in sorted(folder.iterdir()) if f.is_file() and f.stat().st_size < 3_000_000]
    cells = [f.read_bytes() for f in files]
    cells += [c[: len(c) // 3] for c in cells] + [b"", None]
    table = pa.table({"image": cells, "question": ["what is this"] * len(cells), "id": range(len(cells))})
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=16)
    summary = graph.run(make_plan(config(input=str(tmp_path / "photos.parquet"), output=str(tmp_path / "out"), unit_rows=64)))
    rows = {int(r["id"]): r for r in read(tmp_path / "out").to_pylist()}
    assert sorted(rows) == list(range(len(cells)))
    assert summary["errors"] == sum(r["error"] is not None for r in rows.values())
    answered = {files[i].name for i in range(len(files)) if rows[i]["error"] is None}
    assert {"china.jpg", "flower.jpg"} <= answered
    assert len(answered) >= 20
    assert all(rows[i]["error"] for i in range(len(files)) if files[i].suffix in (".txt", ".npy", ".xml", ".py"))


def test_a_run_that_does_not_fit_says_why_and_writes_nothing(config: Any, shards: Path, tmp_path: Path) -> None:
    settings = {"input": str(shards), "output": str(tmp_path / "out")}
    for fields, said in [
        ({"num_actors": 4}, r"4 × cpus_per_actor=1 = 4 CPUs, and one more .* has 4"),
        ({"gpus_per_actor": 1.0}, r"gpus_per_actor=1 = 1 GPUs, and the cluster has 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            graph.run(make_plan(config(**settings, **fields)))
    assert not (tmp_path / "out").exists()
    with fitted(config(num_actors=3)) as each:
        assert each.gpus == 0


def test_a_broken_model_ends_the_run(config: Any, shards: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    import shutil

    from jobs.report import cause

    shutil.copytree(checkpoint_folder, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match="can't be loaded") as caught:
        graph.run(make_plan(config(input=str(shards), output=str(tmp_path / "out"), model=str(tmp_path / "model"))))
    assert "can't be loaded: SafetensorError" in cause(caught.value)
    assert "\n" not in cause(caught.value)
    assert list((tmp_path / "out").glob("*.parquet")) == []


def test_partitions_share_a_folder(config: Any, shards: Path, tmp_path: Path) -> None:
    """Independent jobs, each with its record and its lock; together they are the run."""
    made = {"input": str(shards), "output": str(tmp_path / "out"), "unit_rows": 5}
    plans = [make_plan(config(**made, partition=f"{i}/3")) for i in (1, 2, 3)]
    summaries = [graph.run(plan) for plan in plans]
    assert [s["rows"] for s in summaries] == [plan.rows for plan in plans]
    assert sum(s["rows"] for s in summaries) == 30
    assert len(set(read(tmp_path / "out")["id"].to_pylist())) == 30
    assert (tmp_path / "out/.run/summary-2-of-3.json").exists()
    assert graph.run(make_plan(config(**made, partition="2/3"))) == summaries[1]
    for other in ({"partition": "1/2"}, {}):
        with pytest.raises(RefusalError, match="partitions"):
            make_plan(config(**made, **other))
    with pytest.raises(ValueError, match="partition='40/50' of 6 units is empty"):
        make_plan(config(**{**made, "output": str(tmp_path / "other")}, partition="40/50"))
    plan = make_plan(config(**made, overwrite=True))
    assert len(plan.removes) == 6 + 6 + 3 + 3
    assert graph.run(plan)["rows"] == 30
