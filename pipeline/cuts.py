"""Where a cut inside a row group really lies: between two images, so that adjacent rows of one image stay in one unit.

Planning sees footers alone and cuts *nominally*, at a row index. Whoever reads moves the cut to the first row, at or after the
nominal one, whose image differs from the row's before. The readers of both units beside a cut look at the same rows and so
come to the same place, without a word between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa


def find_cut(nominal: int, reach: int, cell: Callable[[int], pa.Scalar | None]) -> int:
    """The real cut's row index, from ``nominal`` to ``nominal + reach``; ``nominal`` where no two images differ there.

    Args:
        nominal: index of the row before which the plan cuts.
        reach: rows by which the cut may move. At 0 no row is looked at.
        cell: a row's image cell by index, None for a row that can't be had. Asked in ascending order, from ``nominal - 1`` on,
            and not past the first difference.
    """
    if reach == 0:
        return nominal
    before = cell(nominal - 1)
    for index in range(nominal, nominal + reach + 1):
        here = cell(index)
        if before is None or here is None:
            return nominal
        if not same_images(before, here):
            return index
        before = here
    return nominal


def same_images(one: pa.Scalar, other: pa.Scalar) -> bool:
    """Whether two cells of one column hold the same images in the same order: equal encoded bytes, else equal paths.

    Cells without an image are not the same, nor are those with an image that is null or empty: there is nothing to share.
    """
    left, right = _images(one), _images(other)
    # Scalars of different types, such as bytes and a path, never equal each other.
    return 0 < len(left) == len(right) and all(_holds(a) and a.equals(b) for a, b in zip(left, right, strict=True))


def _images(cell: pa.Scalar) -> list[pa.Scalar]:
    """Each image of the cell as its bytes or, without those, its path; either may be null."""
    cell = _stored(cell)
    if not cell.is_valid:
        return []
    members: Iterable[pa.Scalar] = cell if isinstance(cell, pa.ListScalar) else [cell]
    return [_content(_stored(member)) for member in members]


def _content(image: pa.Scalar) -> pa.Scalar:
    if not (isinstance(image, pa.StructScalar) and image.is_valid):
        return image
    fields = [_stored(image[name]) for name in ("bytes", "path") if name in image]
    return next((field for field in fields if field.is_valid), fields[0])


def _stored(value: pa.Scalar) -> pa.Scalar:
    """Without dictionary and extension type."""
    while isinstance(value, (pa.DictionaryScalar, pa.ExtensionScalar)):
        value = value.value
    return value if value is not None else pa.scalar(None)


def _holds(content: pa.Scalar) -> bool:
    # Strings are binary scalars too.
    return isinstance(content, pa.BinaryScalar) and content.is_valid and content.as_buffer().size > 0
