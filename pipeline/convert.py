"""Columns that pass through: from a shard's type to the output's, and text that is no UTF-8 made readable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pyarrow as pa
from pyarrow import types

from pipeline.parquet import damaged, open_parquet
from pipeline.schema import Columns, is_list, plain
from pipeline.storage import Storage
from pipeline.units import Shard, Unit, rows_used

_READERS = 8
_BATCH = 65536


def convert(column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> pa.Array:
    """``column`` as one array of type ``kind``. Raises Arrow's exceptions where a value does not fit; see ``check_values``."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    array = array if array.type == kind else array.cast(kind)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        # Bytes that are no UTF-8 would make the output unreadable to others. (Taken anew, an array begins at its buffers'
        # beginning, and so do those inside of it.)
        return _repaired(array.take(pa.array(range(len(array)))))
    return array


def _repaired(array: pa.Array) -> pa.Array:
    """``array`` with each byte that is no UTF-8, at any depth, as the replacement character."""
    kind = array.type
    if types.is_string(kind) or types.is_large_string(kind):
        raw = array.cast(pa.large_binary()).to_pylist()
        return pa.array([None if value is None else value.decode(errors="replace") for value in raw], kind)
    if types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(array.indices, _repaired(array.dictionary))
    if types.is_struct(kind):
        inside, own = [array.field(i) for i in range(kind.num_fields)], 1
    elif types.is_map(kind):
        entries = pa.StructArray.from_arrays([array.keys, array.items], fields=[kind.key_field, kind.item_field])
        inside, own = [entries], 2
    elif is_list(kind):
        inside, own = [array.values], 1 if types.is_fixed_size_list(kind) else 2
    else:
        return array
    return pa.Array.from_buffers(kind, len(array), array.buffers()[:own], children=[_repaired(each) for each in inside])


def check_values(
    root: Storage,
    shards: Sequence[Shard],
    units: Sequence[Unit],
    columns: Columns,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Raises ``ValueError`` where a row of ``units`` holds a value that the type which its shard shares with the others can't.

    Only columns whose types don't tell are read, such as one of int64 that others have as double.
    """
    stops, doubtful = rows_used(units), []
    for shard in shards:
        kinds = {name: columns.types.field(out).type for name, out in columns.passed if name in shard.schema.names}
        asked = {name: kind for name, kind in kinds.items() if not _always_fits(plain(shard.schema.field(name).type), kind)}
        if asked and shard.name in stops:
            doubtful.append((shard, stops[shard.name], asked))
    if not doubtful:
        return
    names = sorted({name for _, _, asked in doubtful for name in asked})
    say(f"looking whether the shards' common types hold all values of {', '.join(names)} in {len(doubtful):,} of them")
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(lambda each: root.patiently(lambda: _check(root, *each)), doubtful))


def _check(root: Storage, shard: Shard, stop: int, kinds: dict[str, pa.DataType]) -> None:
    fs, _ = root.open()
    with fs.open(root.path(shard.name), "rb") as handle:
        file = open_parquet(handle)
        for group, start in enumerate([0, *accumulate(shard.groups)][:-1]):
            if start >= stop:
                return
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=list(kinds), use_threads=False):
                    for name, kind in kinds.items():
                        _check_batch(shard.name, name, batch[name], kind)
            except (pa.ArrowException, OSError) as error:
                # These rows will say so themselves.
                if not damaged(error):
                    raise


def _check_batch(shard: str, name: str, array: pa.Array, kind: pa.DataType) -> None:
    try:
        converted = convert(array, kind)
        said = "digits would be lost" if _loses_digits(array, converted) else None
    except pa.ArrowException as error:
        said = str(error).splitlines()[0].rstrip(".")
    if said is not None:
        raise ValueError(
            f"column {name!r} is {array.type} in {shard} and {kind} for all shards together, which does not hold all of its "
            f"values ({said}); give it one type, or run the shards on their own"
        )


def _loses_digits(array: pa.Array, converted: pa.Array) -> bool:
    """Whether decimals have become floats that are no longer they: Arrow rounds them without a word."""
    kind = plain(array.type)
    if not _holds(kind, types.is_decimal) or not _holds(converted.type, types.is_floating):
        return False
    # In their text NaNs are equal.
    return repr(converted.cast(kind).to_pylist()) != repr(array.cast(kind).to_pylist())


def _holds(kind: pa.DataType, asked: Callable[[pa.DataType], bool]) -> bool:
    """Whether ``kind``, or a type inside of it, is one that is ``asked`` for."""
    return asked(kind) or any(_holds(kind.field(i).type, asked) for i in range(kind.num_fields))


def _always_fits(kind: pa.DataType, into: pa.DataType) -> bool:
    if kind == into or types.is_null(kind):
        return True
    if types.is_integer(kind) and types.is_integer(into):
        signed = types.is_signed_integer(into)
        return into.bit_width > kind.bit_width and (signed or types.is_unsigned_integer(kind))
    if types.is_integer(kind) and types.is_floating(into):
        return kind.bit_width < into.bit_width
    if types.is_floating(kind) and types.is_floating(into):
        return into.bit_width > kind.bit_width
    strings = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(known(kind) for known in strings) and any(known(into) for known in strings)
