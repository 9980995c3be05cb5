"""The demo's shards: layout, contents, and what happens to a folder that holds something already."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo import easy_vqa, photographs, scenes, shards

QUESTIONS, SCENES, ROWS = 300, 40, 100


def write(folder: Path, *extra: str) -> int:
    return shards.main(["--output", str(folder), "--rows-per-shard", str(ROWS), *extra])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    assert write(folder, "--easy-vqa", str(QUESTIONS), "--scenes", str(SCENES)) == 0
    return folder


@pytest.mark.parametrize("name", ["easy-vqa-test", "scenes-test"])
def test_columns_are_the_hugging_face_image_layout(written: Path, name: str) -> None:
    schema = pq.read_schema(next((written / name).iterdir()))
    assert schema.names == ["image", "question", "answer", "id", "kind"]
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert all(schema.field(name).type == pa.string() for name in schema.names[1:])


def test_datasets_opens_the_shards_and_shows_images(written: Path, tmp_path: Path) -> None:
    import datasets

    for name, rows in {"easy-vqa-test": QUESTIONS, "scenes-test": SCENES * 6}.items():
        loaded = datasets.load_dataset("parquet", data_dir=str(written / name), cache_dir=str(tmp_path))["train"]
        assert len(loaded) == rows
        assert isinstance(loaded.features["image"], datasets.Image)
        assert isinstance(loaded[0]["image"], Image.Image)


def test_shards_are_several_and_even_and_no_image_is_cut(written: Path) -> None:
    for name, count in {"easy-vqa-test": 3, "scenes-test": 3}.items():
        files = sorted((written / name).iterdir())
        assert [path.name for path in files] == [f"part-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
        paths = [pq.read_table(path)["image"].combine_chunks().field("path").to_pylist() for path in files]
        assert all(ROWS * 0.7 < len(shard) < ROWS * 1.2 for shard in paths)
        in_shard = [set(shard) for shard in paths]
        assert sum(map(len, in_shard)) == len(set().union(*in_shard))
        for shard in paths:
            changes = sum(a != b for a, b in itertools.pairwise(shard))
            assert changes == len(set(shard)) - 1, "rows of one image are neighbours"


def test_scenes_have_an_equal_share_of_each_kind_and_unique_stable_ids(written: Path) -> None:
    table = pq.read_table(written / "scenes-test")
    assert Counter(table["kind"].to_pylist()) == dict.fromkeys(scenes.KINDS, SCENES)
    ids = table["id"].to_pylist()
    assert ids[:2] == ["scenes/test/000000/color", "scenes/test/000000/shape"]
    assert len(set(ids)) == len(ids)
    row = table.slice(17 * 6, 1).to_pylist()[0]
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert image.format == "PNG"
        assert image.size == (scenes.scene("test", 17).width, scenes.scene("test", 17).height)


def test_easy_vqa_rows_are_its_own_and_spread_over_the_images(written: Path) -> None:
    everything = easy_vqa.questions("test")
    rows = pq.read_table(written / "easy-vqa-test").to_pylist()
    assert len({row["id"] for row in rows}) == QUESTIONS
    for row in rows:
        item = everything[int(row["id"].removeprefix("easy-vqa/test/"))]
        assert (row["question"], row["answer"], row["kind"]) == (item.text, item.answer, easy_vqa.kind(item.text))
        assert row["image"]["bytes"] == item.path.read_bytes()
    images = {row["image"]["path"] for row in rows}
    assert len(images) > 200
    assert max(images) > "easy-vqa-test-000950"


def test_the_whole_split_is_the_default() -> None:
    rows = [row for image in shards.easy_vqa_rows("test", shards.EASY_VQA_QUESTIONS["test"]) for row in image]
    assert len(rows) == 9_673
    assert [row.id for row in rows] == [f"easy-vqa/test/{i:06d}" for i in range(9_673)]
    assert {split: len(easy_vqa.questions(split)) for split in ("train", "test")} == shards.EASY_VQA_QUESTIONS


def test_training_shards_hold_training_data_alone(tmp_path: Path) -> None:
    assert write(tmp_path, "--split", "train", "--easy-vqa", "20", "--scenes", "3") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"easy-vqa-train", "scenes-train"}
    ids = [i for name in ("easy-vqa-train", "scenes-train") for i in pq.read_table(tmp_path / name)["id"].to_pylist()]
    assert len(ids) == 20 + 18
    assert all("/train/" in name for name in ids)


def test_scenes_over_photographs_are_a_set_of_their_own(tmp_path: Path) -> None:
    assert write(tmp_path, "--easy-vqa", "0", "--scenes", "0", "--photo-scenes", "3") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["photo-scenes-test"]
    rows = pq.read_table(tmp_path / "photo-scenes-test").to_pylist()
    assert [row["id"] for row in rows[:2]] == ["photo-scenes/test/000000/color", "photo-scenes/test/000000/shape"]
    first = scenes.scene("test", 0, style=scenes.PHOTO)
    assert rows[5]["answer"] == first.caption
    with Image.open(io.BytesIO(rows[0]["image"]["bytes"])) as image:
        assert image.tobytes() == scenes.draw(first).tobytes()


def test_photographs_that_are_missing_are_named_and_no_part_of_their_set_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photographs, "FOLDER", tmp_path / "nowhere")
    photographs.photograph.cache_clear()
    assert write(tmp_path / "out", "--split", "train", "--easy-vqa", "0", "--scenes", "2", "--photo-scenes", "2") == 2
    assert "python -m demo.photographs" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*")] == ["scenes-train"]


def test_the_same_options_leave_the_files_alone(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*.parquet")}
    assert write(written, "--easy-vqa", str(QUESTIONS), "--scenes", str(SCENES)) == 0
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*.parquet")} == before
    assert capsys.readouterr().out.count("already there") == 2


def test_other_options_replace_the_shards_and_a_lost_shard_comes_back(tmp_path: Path) -> None:
    small = ("--easy-vqa", "0", "--scenes", "20", "--kinds", "color,caption")
    assert write(tmp_path, "--easy-vqa", "0", "--scenes", "40") == 0
    assert write(tmp_path, *small) == 0
    (file,) = (tmp_path / "scenes-test").iterdir()
    content = file.read_bytes()
    assert set(pq.read_table(file)["kind"].to_pylist()) == {"color", "caption"}
    file.unlink()
    assert write(tmp_path, *small) == 0
    assert file.read_bytes() == content, "the same options write the same bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["scenes-test"], "nothing is left behind"


@pytest.mark.parametrize("foreign", ["notes.txt", "part-00000-of-00001.parquet"])
def test_a_folder_of_something_else_is_refused_before_anything_is_written(
    tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenes-test"
    folder.mkdir()
    if foreign.endswith(".parquet"):
        pq.write_table(pa.table({"a": [1]}), folder / foreign)
    else:
        (folder / foreign).write_text("mine")
    assert write(tmp_path, "--easy-vqa", "10", "--scenes", "2") == 2
    assert f"holds {foreign}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["scenes-test", foreign]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--easy-vqa", "9674"], "9673 questions"),
        (["--scenes", "-1"], "--scenes -1"),
        (["--photo-scenes", "-2"], "--photo-scenes -2"),
        (["--kinds", "color,smell"], "'smell'"),
        (["--rows-per-shard", "0"], "--rows-per-shard 0"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        shards.main(["--output", str(tmp_path), *options])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
