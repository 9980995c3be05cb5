"""Write the demo's data sets as parquet shards in the Hugging Face image layout: ``python -m demo.shards --output FOLDER``.

``FOLDER/easy-vqa-test/`` and ``FOLDER/scenes-test/`` (``-train`` with ``--split train``), and ``FOLDER/photo-scenes-test/``
where they are asked for, each hold a few shards with the columns ``image: struct<bytes, path>``, ``question``, ``answer``,
``id`` and ``kind``. Rows of one image are neighbours in one shard. The same options write the same bytes; a folder that already
holds them is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from demo import easy_vqa, photographs, scenes
from demo.scenes import FLAT, PHOTO, Style

EASY_VQA_QUESTIONS = {"train": 38_575, "test": 9_673}
# Small enough for a few shards in the smallest demo, large enough that a shard is not all footer.
ROWS_PER_SHARD = 1_000
ROWS_PER_GROUP = 250
SETTINGS_KEY = b"demo.shards"


class Row(NamedTuple):
    """One question; ``image`` is an encoded file."""

    image: bytes
    path: str
    question: str
    answer: str
    id: str
    kind: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that the data sets' folders are written in")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--easy-vqa", type=int, metavar="N", help="questions of easy-VQA, spread over its images; default: all")
    parser.add_argument("--scenes", type=int, metavar="N", default=500, help="scenes (default: %(default)s)")
    parser.add_argument(
        "--photo-scenes", type=int, metavar="N", default=0, help="scenes over photographs, the second model's (default: none)"
    )
    parser.add_argument("--kinds", default=",".join(scenes.KINDS), help="questions asked of each scene (default: %(default)s)")
    parser.add_argument("--rows-per-shard", type=int, metavar="N", default=ROWS_PER_SHARD)
    options = parser.parse_args(arguments)
    split, most = options.split, EASY_VQA_QUESTIONS[options.split]
    questions = most if options.easy_vqa is None else options.easy_vqa
    kinds = tuple(options.kinds.split(","))
    if not 0 <= questions <= most:
        parser.error(f"--easy-vqa {questions}: the {split} split holds {most} questions")
    drawn = {FLAT: options.scenes, PHOTO: options.photo_scenes}
    for style, count in drawn.items():
        if count < 0:
            parser.error(f"--{style.name} {count}: give 0 or more")
    if unknown := [kind for kind in kinds if kind not in scenes.KINDS]:
        parser.error(f"--kinds {options.kinds}: {unknown[0]!r} is none of {', '.join(scenes.KINDS)}")
    if options.rows_per_shard < 1:
        parser.error(f"--rows-per-shard {options.rows_per_shard}: give 1 or more")

    # Shards of older drawings are written anew.
    made_by = hashlib.sha256(b"".join(Path(module.__file__ or "").read_bytes() for module in (easy_vqa, scenes, photographs)))
    common = {"made_by": made_by.hexdigest()[:16], "rows_per_shard": options.rows_per_shard}
    sets: list[tuple[Path, dict[str, object], int, Iterator[list[Row]]]] = []
    if questions:
        settings: dict[str, object] = {**common, "questions": questions}
        sets.append((options.output / f"easy-vqa-{split}", settings, questions, easy_vqa_rows(split, questions)))
    for style, count in drawn.items():
        if count:
            settings = {**common, "scenes": count, "kinds": list(kinds)}
            rows = scene_rows(split, count, kinds, style)
            sets.append((options.output / f"{style.name}-{split}", settings, count * len(kinds), rows))
    try:
        there = [holds(folder, settings) for folder, settings, *_ in sets]
    except FileExistsError as error:
        print(f"demo.shards: {error}", file=sys.stderr)
        return 2
    for done, (folder, settings, total, groups) in zip(there, sets, strict=True):
        if not done:
            try:
                write(folder, settings, tables(groups, settings, even_shards(total, options.rows_per_shard)))
            except FileNotFoundError as error:  # a photograph
                print(f"demo.shards: {error}", file=sys.stderr)
                return 2
        print(f"{folder}: {total:,} rows{' (already there)' if done else ''}")
    return 0


# ---- rows, one list an image ------------------------------------------------------------------------------------------------


def easy_vqa_rows(split: str, count: int) -> Iterator[list[Row]]:
    """``count`` questions of the split, drawn over all its images with a seed."""
    everything = easy_vqa.questions(split)
    chosen = sorted(random.Random(f"easy-vqa/{split}/{count}").sample(range(len(everything)), count))
    for image, numbers in itertools.groupby(chosen, key=lambda number: everything[number].image):
        rows: list[Row] = []
        for number in numbers:
            item = everything[number]
            content = rows[0].image if rows else item.path.read_bytes()
            path, name = f"easy-vqa-{split}-{image:06d}.png", f"easy-vqa/{split}/{number:06d}"
            rows.append(Row(content, path, item.text, item.answer, name, easy_vqa.kind(item.text)))
        yield rows


def scene_rows(split: str, count: int, kinds: Sequence[str], style: Style = FLAT) -> Iterator[list[Row]]:
    """One question of each kind on each of the first ``count`` scenes of the split. FileNotFoundError where photographs for
    training are missing."""
    for index in range(count):
        scene = scenes.scene(split, index, style=style)
        content = io.BytesIO()
        scenes.draw(scene).save(content, "PNG")
        rows = []
        for kind in kinds:
            asked = scenes.question(scene, kind, random.Random(f"{split}/{index}/{kind}"))
            if asked is None:
                raise RuntimeError(f"scene {split}/{index} allows no question on {kind}")
            path, name = f"{style.name}-{split}-{index:06d}.png", f"{style.name}/{split}/{index:06d}/{kind}"
            rows.append(Row(content.getvalue(), path, *asked, name, kind))
        yield rows


# ---- files ------------------------------------------------------------------------------------------------------------------


def schema(settings: dict[str, object]) -> pa.Schema:
    """The columns, with what ``datasets`` needs to show images and what this program needs to know its own shards."""
    text = ("question", "answer", "id", "kind")
    features: dict[str, object] = {"image": {"_type": "Image"}}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in text}
    columns = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *((name, pa.string()) for name in text)]
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}), SETTINGS_KEY: json.dumps(settings)}
    return pa.schema(columns, metadata=metadata)


def holds(folder: Path, settings: dict[str, object]) -> bool:
    """Whether ``folder`` holds the shards of ``settings``, all of them. FileExistsError if it holds anything not ours."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another --output")
    found = sorted(folder.iterdir()) if folder.exists() else []
    for path in found:
        if settings_of(path) is None:
            raise FileExistsError(f"{folder} holds {path.name}, which this program did not write: choose another --output")
    if not found:
        return False
    whole = found[-1].name.endswith(f"-of-{len(found):05d}.parquet")
    return whole and all(settings_of(path) == settings for path in found)


def settings_of(path: Path) -> dict[str, object] | None:
    """What ``path`` was written with, or None where it is no shard of ours."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[SETTINGS_KEY])
    except (KeyError, OSError, pa.ArrowInvalid):
        return None


def write(folder: Path, settings: dict[str, object], shards: Iterable[pa.Table]) -> None:
    """Write ``shards`` to ``folder``, which appears, or is replaced, only once every one is whole."""
    part = folder.parent / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rows = 0
    try:
        for number, shard in enumerate(shards):
            pq.write_table(shard, part / f"{number:05d}", row_group_size=ROWS_PER_GROUP)
            rows += len(shard)
            print(f"{folder}: {rows:,} rows", end="\r", file=sys.stderr, flush=True)
        files = sorted(part.iterdir())
        for number, path in enumerate(files):
            path.rename(part / f"part-{number:05d}-of-{len(files):05d}.parquet")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def even_shards(rows: int, most: int) -> int:
    """Rows a shard so that as few shards as hold ``rows`` at ``most`` each are about equally full."""
    return -(-rows // -(-rows // most))


def tables(groups: Iterable[list[Row]], settings: dict[str, object], rows_per_shard: int) -> Iterator[pa.Table]:
    """Shards of ``rows_per_shard`` rows and what it takes to complete the last image."""
    rows: list[Row] = []
    for group in groups:
        rows += group
        if len(rows) >= rows_per_shard:
            yield table(rows, settings)
            rows = []
    if rows:
        yield table(rows, settings)


def table(rows: list[Row], settings: dict[str, object]) -> pa.Table:
    columns: dict[str, list[object]] = {"image": [{"bytes": row.image, "path": row.path} for row in rows]}
    columns |= {name: [getattr(row, name) for row in rows] for name in ("question", "answer", "id", "kind")}
    return pa.table(columns, schema=schema(settings))


if __name__ == "__main__":
    sys.exit(main())
