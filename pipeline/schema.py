"""All column names and Arrow schemas: of an input, of a unit on its way to an actor, and of the output.

How input columns come out
--------------------------
- The image column does not come out; its digest does.
- The id column (``RunConfig.id_column``, or ``id`` where the input has one) becomes ``id``, as a string. If its name is not
  ``id`` it also passes through under its own name with its own type.
- Every other column passes through, the question and the answer among them. One that bears an output column's name, in any
  case (DuckDB tells no cases apart), comes out as ``input_<name>``; so does an ``id`` column that is not the id column.
- Only the shards' schemas decide the output's, never what a shard happens to hold. Types that differ between shards are widened
  where Arrow can widen them, and refused otherwise; so is a value that the wider type does not hold (``pipeline.convert``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

UNIT = "unit"
"""Column that names a unit, as its output file is named."""
ROWS = "rows"
"""Column that holds all rows of a unit, as one large list."""
STATS = "stats"
"""Column that holds a unit's statistics, as JSON."""

ID, TEXT, FINISH_REASON, ERROR = "id", "text", "finish_reason", "error"
IMAGES, IMAGE_DIGEST, KEEP_FRACTION = "images", "image_digest", "keep_fraction"
KEPT, MERGED_INTO, TILE_GRID = "kept", "merged_into", "tile_grid"

TILE_GRID_TYPE = pa.list_(pa.struct([("columns", pa.int32()), ("rows", pa.int32())]))

OUTPUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field(ID, pa.string()),
    pa.field(TEXT, pa.string()),
    pa.field(FINISH_REASON, pa.string()),
    pa.field(ERROR, pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("output_tokens", pa.int32()),
    pa.field(IMAGES, pa.int32()),
    pa.field("tiles", pa.int32()),
    pa.field(IMAGE_DIGEST, pa.string()),
    pa.field("visual_tokens", pa.int32()),
    pa.field("kept_visual_tokens", pa.int32()),
    pa.field(KEEP_FRACTION, pa.float64()),
    pa.field("tower_keep_fraction", pa.float64()),
    pa.field("cross_kv_bytes_full", pa.int64()),
    pa.field("cross_kv_bytes", pa.int64()),
    pa.field("self_kv_bytes", pa.int64()),
)
KEPT_FIELDS: tuple[pa.Field, ...] = (
    pa.field(KEPT, pa.list_(pa.int32())),
    pa.field(MERGED_INTO, pa.list_(pa.int32())),
    pa.field(TILE_GRID, TILE_GRID_TYPE),
)
_RESERVED = frozenset(f.name for f in OUTPUT_FIELDS + KEPT_FIELDS)

# One image on its way: its file's bytes, or why they could not be had.
IMAGE_TYPE = pa.struct([("bytes", pa.large_binary()), ("error", pa.string())])


@dataclass(frozen=True, slots=True)
class Columns:
    """An input's columns, by role. ``passed`` maps input names to output names, in the input's order."""

    image: str
    question: str | None
    id: str | None
    answer: str | None
    passed: tuple[tuple[str, str], ...]
    types: pa.Schema
    """Output names and types of the passed columns."""

    @property
    def read(self) -> list[str]:
        """Input columns that must be read."""
        roles = [name for name in (self.image, self.question, self.id) if name]
        return list(dict.fromkeys([name for name, _ in self.passed] + roles))

    @property
    def answer_output(self) -> str | None:
        """The answer column's name in the output."""
        return dict(self.passed).get(self.answer) if self.answer else None

    def unit_row(self) -> pa.StructType:
        """Type of one row on its way to an actor: the passed columns, then ``id``, ``text`` (the question) and ``images``.

        The three names are the output's, so no passed column can bear them.
        """
        own = [pa.field(ID, pa.string()), pa.field(TEXT, pa.large_string()), pa.field(IMAGES, pa.large_list(IMAGE_TYPE))]
        return pa.struct([*self.types, *own])

    def output(self, write_kept: bool) -> pa.Schema:
        """The output files' schema."""
        return pa.schema([*self.types, *OUTPUT_FIELDS, *(KEPT_FIELDS if write_kept else ())])


def plan_columns(
    schemas: Sequence[tuple[str, pa.Schema]],
    *,
    image: str,
    question: str | None,
    id: str | None,
    answer: str | None,
) -> Columns:
    """Roles, output names and types from the shards' schemas, given as (shard, schema).

    ``id`` and ``answer`` of None stand for the columns of these names where the input has them; an empty ``id`` for none.
    Raises ``ValueError`` for a missing column, a type that can't serve, and shards that disagree.
    """
    first = schemas[0][1]
    names = set(first.names)
    for shard, schema in schemas:
        _check_shard(shard, schema, image, question, id or None)
        names &= set(schema.names)
    if id == "":
        id = None
    elif id is None and "id" in names and _identifies(first.field("id").type):
        id = "id"
    for shard, schema in schemas:
        if id is not None and not _identifies(schema.field(id).type):
            raise ValueError(f"id_column={id!r} is {schema.field(id).type} in {shard}; ids are strings or integers")

    unified = _unify(schemas, image)
    if answer is None and "answer" in unified.names:
        answer = "answer"
    if answer is not None and answer not in unified.names:
        raise ValueError(
            f"answer_column={answer!r} is not a column of the input, which has {', '.join(unified.names) or 'none'}"
        )
    passed: dict[str, str] = {}
    taken = {n.lower() for n in unified.names} | _RESERVED
    for name in unified.names:
        if name == id == ID:
            continue
        out = name
        while out.lower() in _RESERVED or (out != name and out.lower() in taken):
            out = f"input_{out}"
        taken.add(out.lower())
        passed[name] = out
    types = pa.schema([pa.field(out, unified.field(name).type) for name, out in passed.items()])
    return Columns(image, question, id, answer, tuple(passed.items()), types)


def _check_shard(shard: str, schema: pa.Schema, image: str, question: str | None, id: str | None) -> None:
    twice = {n for n in schema.names if schema.names.count(n) > 1}
    if twice:
        raise ValueError(f"{shard} has two columns named {min(twice)!r}; rename one")
    asked = {"image_column": image, "question_column": question, "id_column": id}
    for option, name in asked.items():
        if name is not None and name not in schema.names:
            raise ValueError(f"{option}={name!r} is not a column of {shard}, which has {', '.join(schema.names) or 'none'}")
    if not _pictures(schema.field(image).type):
        kind = schema.field(image).type
        raise ValueError(
            f"image_column={image!r} is {kind} in {shard}; images are bytes, {{bytes, path}} structs, paths, or lists of these"
        )
    if question is not None and not _words(plain(schema.field(question).type)):
        raise ValueError(f"question_column={question!r} is {schema.field(question).type} in {shard}; questions are strings")


def _unify(schemas: Sequence[tuple[str, pa.Schema]], image: str) -> pa.Schema:
    unified = pa.schema([])
    for shard, schema in schemas:
        # Metadata goes: pandas' and datasets' describe the input's columns, not the output's.
        bare = pa.schema([pa.field(f.name, plain(f.type)) for f in schema if f.name != image])
        try:
            unified = pa.unify_schemas([unified, bare], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise ValueError(f"{shard} does not fit the shards before it: {error}; convert it, or run it on its own") from error
    return unified


def plain(kind: pa.DataType) -> pa.DataType:
    """``kind`` as it is written: dictionaries decoded, views and extension types as their storage."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    return kind


def _words(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _identifies(kind: pa.DataType) -> bool:
    kind = plain(kind)
    return _words(kind) or pa.types.is_integer(kind)


def _bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _pictures(kind: pa.DataType) -> bool:
    kind = plain(kind)
    if is_list(kind):
        return _pictures(kind.value_type) and not is_list(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return _bytes(kind) or _words(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
