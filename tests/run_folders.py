"""Whole run folders from plain row dicts, for tests that need exact numbers: written by the pipeline's own functions, without a
model, an actor or Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import record, schema
from pipeline.config import RunConfig
from pipeline.engine import Answer
from pipeline.model import versions
from pipeline.rows import Row, pack, tally
from pipeline.sink import UnitWriter
from pipeline.storage import Storage

TOKENS_PER_TILE = 4
TOKEN_BYTES = 1000
"""Cross-attention KV bytes of one visual token in these folders."""
SELF_TOKEN_BYTES = 100
DIGEST = "0123456789abcdef"

# A row's columns that come from the run; all others of a row dict pass through from the input.
_OWN = {f.name for f in (*schema.OUTPUT_FIELDS, *schema.KEPT_FIELDS)}


def write_run(
    folder: Path | str | Storage,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    unit_rows: int = 4,
    unfinished: int = 0,
    partition: tuple[int, int] = (1, 1),
    stats: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    device: str = "CPU, 2 threads",
    dtype: str = "float32",
    input_digest: str = DIGEST,
    identity: str = "tiny-checkpoint",
    passed: pa.Schema | None = None,
    columns: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes a complete, valid run folder.

    Args:
        folder: where to.
        rows: output rows; what a row leaves out has a default. ``id`` and ``text`` matter most; a row with ``error`` has no
            answer. ``image_digest`` defaults to one of the row's own (``digest(id)``), ``images`` and ``tiles`` to 1,
            ``output_tokens`` to the text's words, ``keep_fraction`` to 1, KV bytes to what follows from tiles and fraction.
            Names that are no output columns pass through, ``answer`` among them.
        config: fields of ``RunConfig``, such as ``policy``, ``k_ratio``, ``write_kept``, ``input``; names that it does not have
            are recorded as they are.
        unit_rows: rows of each unit.
        unfinished: units at the end that are planned and not written, as after a run that broke off; the run's summary then is
            missing.
        partition: (i, n); ``rows`` are this partition's alone.
        stats: added to each unit's statistics, e.g. ``{"actor_seconds": 2.0, "gpus": 1}`` (by default 2 seconds, without a
            GPU, in which each row held its own cross-attention cache for a second and read it twice); a value of None takes a
            name out.
        seconds: seconds by stage of each unit.
        device, dtype: what the units ran on.
        input_digest, identity: of the input and of the checkpoint.
        passed: types of the columns that pass through; default: as Arrow infers them.
        columns: run.json's map of input to output names; default: each to itself.
        run: replaces entries of run.json, e.g. ``{"versions": {...}}``.
    """
    output = folder if isinstance(folder, Storage) else Storage(str(folder))
    i, n = partition
    known = {name: value for name, value in (config or {}).items() if name in RunConfig.__dataclass_fields__}
    made = RunConfig(
        **{
            "job": "answer",
            "input": "in",
            "output": output.url,
            "model": "tiny",
            "partition": f"{i}/{n}" if n > 1 else None,
            "unit_rows": unit_rows,
            "policy": "none",
            **known,
        }
    )
    recorded = made.recorded() | {name: value for name, value in (config or {}).items() if name not in known}
    through = [{name: value for name, value in row.items() if name not in _OWN} for row in rows]
    names = list(dict.fromkeys(name for row in through for name in row))
    types = passed or pa.Table.from_pylist([{name: row.get(name) for name in names} for row in through]).schema
    mapping = dict(columns) if columns is not None else {name: name for name in types.names}
    truth = made.answer_column or ("answer" if "answer" in mapping else None)
    question = made.question_column if made.job == "answer" else None
    roles = schema.Columns(made.image_column, question, "id", truth, tuple(mapping.items()), types)

    starts = range(0, len(rows), unit_rows)
    units = [(f"shard-{i:010x}-{start:07d}-{start + unit_rows:07d}", start) for start in starts]
    writer = UnitWriter(output, roles.output(made.write_kept), record.part(i, n))
    written: list[dict[str, Any]] = []
    for name, start in units[: len(units) - unfinished]:
        taken = [_row(row) for row in rows[start : start + unit_rows]]
        packed = _packed(through[start : start + unit_rows], types)
        tallied = tally(taken, packed, roles)
        unit_stats: dict[str, Any] = {
            **tallied,
            "seconds": dict(seconds or {"decode_images": 0.25, "tower": 0.5, "prefill": 0.5, "decode": 1.0}),
            "device": device,
            "dtype": dtype,
            "peak_memory_bytes": 2**30,
            "peak_sequences": 3,
            "peak_kv_bytes": 3000,
            "peak_cross_kv_bytes": 2000,
            "cross_kv_byte_seconds": float(tallied["cross_kv_bytes"]),
            "cross_kv_byte_seconds_full": float(tallied["cross_kv_bytes_full"]),
            "cross_kv_bytes_read": 2 * tallied["cross_kv_bytes"],
            "actor_seconds": 2.0,
            "gpus": 0,
            **(stats or {}),
        }
        unit_stats = {name: value for name, value in unit_stats.items() if value is not None}
        written.append(writer(name, pack(taken, packed, roles, made.write_kept), unit_stats))
    decides = {
        "input": input_digest,
        "model": identity,
        "schema": str(roles.output(made.write_kept)),
        **made.decides_output(),
    }
    record.begin(
        output,
        {
            "config": recorded,
            "checkpoint": {"source": made.model, "identity": identity},
            "decides": decides,
            "versions": versions(),
            "shards": 1,
            "units": len(units),
            "rows": len(rows),
            "columns": mapping,
            "started": "2026-11-21T10:00:00+00:00",
            **(run or {}),
        },
        record.part(i, n),
    )
    if not unfinished:
        record.write_summary(output, record.summarise(written), record.part(i, n))


def digest(name: str) -> str:
    """An image digest that follows from ``name``."""
    return hashlib.sha256(name.encode()).hexdigest()


def _row(given: Mapping[str, Any]) -> Row:
    images = given.get("images", 1)
    tiles = given.get("tiles", images)
    grids = [(g["rows"], g["columns"]) for g in given.get("tile_grid") or []]
    image = given.get("image_digest", digest(given["id"]) if images else None)
    row = Row(given["id"], images, [], tiles=tiles, grids=grids, digest=image)
    if given.get("error") is not None:
        row.fail(given["error"])
        return row
    text = given.get("text", "")
    fraction = given.get("keep_fraction", 1.0 if tiles else None)
    visual = given.get("visual_tokens", tiles * TOKENS_PER_TILE)
    kept = given.get("kept_visual_tokens", round(visual * (fraction or 0)))
    tokens = given.get("output_tokens", len(text.split()))
    prompt = given.get("prompt_tokens", 10)
    row.answer = Answer(
        text=text,
        finish_reason=given.get("finish_reason", "stop"),
        prompt_tokens=prompt,
        output_tokens=tokens,
        visual_tokens=visual,
        kept_visual_tokens=kept,
        keep_fraction=fraction,
        tower_keep_fraction=given.get("tower_keep_fraction", 1.0 if tiles else None),
        cross_kv_bytes_full=given.get("cross_kv_bytes_full", visual * TOKEN_BYTES),
        cross_kv_bytes=given.get("cross_kv_bytes", kept * TOKEN_BYTES),
        self_kv_bytes=given.get("self_kv_bytes", (prompt + tokens) * SELF_TOKEN_BYTES),
        kept=given.get("kept", list(range(kept))),
    )
    return row


def _packed(through: Sequence[Mapping[str, Any]], types: pa.Schema) -> pa.StructArray:
    own = schema.Columns("image", None, "id", None, (), types).unit_row()
    rows = [{**dict.fromkeys(f.name for f in own), **row} for row in through]
    return pa.array(rows, type=own)
