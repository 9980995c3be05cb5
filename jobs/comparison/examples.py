"""Rows whose answers differ: question, references, both answers, and the image with what each run kept of it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from jobs.comparison.overlay import Geometry
from jobs.comparison.report import reference_columns
from jobs.comparison.runs import Run
from jobs.comparison.shelf import Row, Shelf, Shown, said
from pipeline import schema
from pipeline.parquet import open_parquet
from pipeline.storage import Storage

_READERS = 8


@dataclass(slots=True)
class Side:
    """One run's part of an example."""

    run: str
    text: str
    keep_fraction: float | None
    pictures: list[bytes] = field(default_factory=list)
    """A JPEG for each image of the row."""
    why: list[str] = field(default_factory=list)
    """What is missing of the pictures, and why."""


@dataclass(frozen=True, slots=True)
class Example:
    id: str
    question: str
    references: tuple[str, ...]
    sides: tuple[Side, Side]
    """The baseline's and the run's."""


def load(
    wanted: Mapping[str, Sequence[str]],
    baseline: Run,
    runs: Sequence[Run],
    *,
    input: str | None,
    storage_options: Mapping[str, Any],
    references: str | None = None,
) -> dict[str, list[Example]]:
    """Each run's examples by its name.

    Args:
        wanted: ids by the name of the run that is compared.
        baseline, runs: the runs by those names; others do no harm.
        input: where the shards are now, if not where the runs read them.
        storage_options: of that store and the runs'.
        references: column of the references, as ``report.reference_columns`` takes it.
    """
    by_name = {run.name: run for run in runs}
    asked = {name: ids for name, ids in wanted.items() if ids and name in by_name}
    if not asked:
        return {}
    every = list(dict.fromkeys(id for ids in asked.values() for id in ids))
    truths = reference_columns([baseline], references)[baseline.name]
    found = {baseline.name: _find(baseline, every, truths)}
    found |= {name: _find(by_name[name], ids, None) for name, ids in asked.items()}
    shelf = Shelf(input, storage_options)
    with closing(shelf):
        for name in (baseline.name, *asked):
            shelf.fetch(baseline if name == baseline.name else by_name[name], found[name].values())
        geometries = {name: _geometry(run) for name, run in ((baseline.name, baseline), *by_name.items())}
        out: dict[str, list[Example]] = {}
        for name, ids in asked.items():
            pairs = [(id, found[baseline.name].get(id), found[name].get(id)) for id in ids]
            out[name] = [
                _example(id, (baseline, by_name[name]), (one, other), shelf, geometries, truths)
                for id, one, other in pairs
                if one is not None and other is not None
            ]
    return out


def _example(
    id: str,
    runs: tuple[Run, Run],
    rows: tuple[Row, Row],
    shelf: Shelf,
    geometries: Mapping[str, Geometry | str],
    truths: str | None,
) -> Example:
    values = rows[0].values
    truth = values.get(truths) if truths else None
    sides = tuple(_side(run, row.values, shelf, geometries[run.name]) for run, row in zip(runs, rows, strict=True))
    return Example(id, _question(runs[0], values), _texts(truth), (sides[0], sides[1]))


def _side(run: Run, row: Mapping[str, Any], shelf: Shelf, geometry: Geometry | str) -> Side:
    side = Side(run.name, row[schema.TEXT] or "", row[schema.KEEP_FRACTION])
    if not row[schema.IMAGES]:
        side.why.append("a row without an image")
        return side
    shown = shelf.images(row)
    if isinstance(shown, str):
        side.why.append(shown)
        return side
    drawn = [each.image for each in shown]
    if side.keep_fraction is not None and side.keep_fraction < 1:
        try:
            drawn = _veiled(shown, row, geometry)
        except ValueError as error:
            side.why.append(str(error))
    side.pictures = [_jpeg(each) for each in drawn]
    return side


def _veiled(shown: Sequence[Shown], row: Mapping[str, Any], geometry: Geometry | str) -> list[Image.Image]:
    """Raises ``ValueError`` with the reason why the kept features can't be drawn."""
    if row.get(schema.KEPT) is None or row.get(schema.TILE_GRID) is None:
        raise ValueError("kept features not recorded: the run was made without --write-kept")
    if isinstance(geometry, str):
        raise ValueError(f"kept features not drawn: {geometry}")
    grids = [(grid["rows"], grid["columns"]) for grid in row[schema.TILE_GRID]]
    fits = len(grids) == len(shown) and sum(r * c for r, c in grids) * geometry.tokens == row["visual_tokens"]
    if not fits:
        raise ValueError("kept features not drawn: the row's tiles are not those of the model's config.json")
    into = row.get(schema.MERGED_INTO)
    drawn = []
    for number, (each, grid) in enumerate(zip(shown, grids, strict=True)):
        if into is None:
            drawn.append(geometry.veil(each.image, each.size, geometry.of_image(row[schema.KEPT], number), grid))
        else:
            drawn.append(geometry.regions(each.image, each.size, geometry.merged_in_image(into, number), grid))
    return drawn


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85, optimize=True)
    return out.getvalue()


def _geometry(run: Run) -> Geometry | str:
    """The run's model's, or why it is not known."""
    from pipeline.model import find_checkpoint

    made = run.record["checkpoint"]
    try:
        if "vision_config" in made:
            return Geometry.of(made)
        # A run of an older version.
        return Geometry.of(find_checkpoint(made["source"], run.config.get("revision")).config)
    except (ValueError, OSError) as error:
        return said(error)


def _question(run: Run, row: Mapping[str, Any]) -> str:
    column = _question_column(run)
    asked = row.get(column) if column else run.config.get("prompt")
    return str(asked) if asked is not None else ""


def _question_column(run: Run) -> str | None:
    if run.config.get("prompt"):
        return None
    column: str | None = run.record["columns"].get(run.config.get("question_column"))
    return column


def _texts(truth: Any) -> tuple[str, ...]:
    """References as texts, each once: a text, or a list of them."""
    listed = truth if isinstance(truth, list) else [truth]
    return tuple(dict.fromkeys(each if isinstance(each, str) else json.dumps(each) for each in listed if each is not None))


def _find(run: Run, ids: Sequence[str], truths: str | None) -> dict[str, Row]:
    """The rows of these ids, those that the run has, with their column of references."""
    names = [f.name for f in (*schema.OUTPUT_FIELDS, *schema.KEPT_FIELDS)]
    names += [name for name in (_question_column(run), truths) if name]
    columns = [name for name in dict.fromkeys(names) if name in run.columns]
    found: dict[str, Row] = {}
    units = iter(run.finished)
    with ThreadPoolExecutor(_READERS) as pool:
        while len(found) < len(ids) and (batch := list(islice(units, 2 * _READERS))):
            for rows in pool.map(lambda unit: _search(run.folder, unit, ids, columns), batch):
                found |= rows
    return found


def _search(folder: Storage, unit: str, ids: Sequence[str], columns: Sequence[str]) -> dict[str, Row]:
    name = f"{unit}.parquet"
    file = open_parquet(folder.path(name) if folder.local else pa.BufferReader(folder.read(name)))
    with file:
        have = file.read(columns=[schema.ID])[schema.ID]
        places = pc.indices_nonzero(pc.is_in(have, pa.array(ids, have.type)))
        if not len(places):
            return {}
        rows = file.read(columns=list(columns)).take(places).to_pylist()
    return {row[schema.ID]: Row(unit, index, row) for index, row in zip(places.to_pylist(), rows, strict=True)}
