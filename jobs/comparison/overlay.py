"""Kept features drawn over an image: where each patch lies on it, and a veil over the patches that were dropped."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

VEIL = (58, 62, 76, 205)
EDGE = (255, 255, 255, 230)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a model cuts an image into visual tokens.

    A tile's tokens are its class token, which is nowhere on the image, then its patches by rows. Kept positions count along
    images × ``most_tiles`` × ``tokens``, whatever an image's own number of tiles.
    """

    side: int
    """Pixels of a tile's side."""
    patch: int
    """Pixels of a patch's side."""
    most_tiles: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Geometry:
        """From a checkpoint's config.json. Raises ``ValueError`` where that does not say."""
        vision = config.get("vision_config") or {}
        try:
            return cls(*(int(vision[name]) for name in ("image_size", "patch_size", "max_num_tiles")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("the model's config.json does not say how it cuts images") from error

    @property
    def per_side(self) -> int:
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        """Visual tokens of a tile."""
        return 1 + self.per_side**2

    def of_image(self, kept: Sequence[int], image: int) -> list[int]:
        """Those of a row's ``kept`` positions that are in its ``image``-th image, counted from this image's first."""
        first = image * self.most_tiles * self.tokens
        return [position - first for position in kept if first <= position < first + self.most_tiles * self.tokens]

    def merged_in_image(self, merged_into: Sequence[int], image: int) -> list[int]:
        """What a row's ``merged_into`` says of its ``image``-th image, counted from this image's first position; −1 stays."""
        size = self.most_tiles * self.tokens
        return [into - image * size if into >= 0 else -1 for into in merged_into[image * size : (image + 1) * size]]

    def box(self, position: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float] | None:
        """Where visual token ``position`` lies on an image of ``size`` (width, height), in its pixels; None for a class token.

        ``grid`` is (rows, columns) of tiles. The processor fits the image into their canvas, at its top left, and pads it to
        the right and below; an image smaller than the canvas but not than a tile keeps its size.
        """
        tile, token = divmod(position, self.tokens)
        if token == 0:
            return None
        rows, columns = grid
        sides = zip(size, (columns, rows), strict=True)
        scale = min(min(max(length, self.side), tiles * self.side) / length for length, tiles in sides)
        x = tile % columns * self.side + (token - 1) % self.per_side * self.patch
        y = tile // columns * self.side + (token - 1) // self.per_side * self.patch
        return x / scale, y / scale, (x + self.patch) / scale, (y + self.patch) / scale

    def regions(
        self, shown: Image.Image, size: tuple[int, int], merged_into: Sequence[int], grid: tuple[int, int]
    ) -> Image.Image:
        """``shown`` with a colour over every patch, the same over those that have been merged, and lines between others.

        ``merged_into`` holds, for this image's positions from its first on, the position that each was merged into, counted
        alike; what is −1 is veiled. Otherwise as ``veil``.
        """
        layer = Image.new("RGBA", shown.size, (0, 0, 0, 0))
        canvas = ImageDraw.Draw(layer)
        numbers: dict[int, int] = {}
        owners: dict[tuple[int, int], int] = {}
        patches = list(self._patches(shown, size, grid))
        for position, (left, top, right, bottom) in patches:
            into = owners[left, top] = merged_into[position]
            number = numbers.setdefault(into, len(numbers))
            canvas.rectangle((left, top, right - 1, bottom - 1), fill=VEIL if into < 0 else _colour(number))
        for position, (left, top, right, bottom) in patches:
            into = merged_into[position]
            if owners.get((right, top), into) != into:
                canvas.line((right, top, right, bottom), fill=EDGE)
            if owners.get((left, bottom), into) != into:
                canvas.line((left, bottom, right, bottom), fill=EDGE)
        return Image.alpha_composite(shown.convert("RGBA"), layer).convert("RGB")

    def veil(
        self,
        shown: Image.Image,
        size: tuple[int, int],
        kept: Sequence[int],
        grid: tuple[int, int],
        colour: Sequence[int] = VEIL,
    ) -> Image.Image:
        """``shown``, an image that had ``size`` when the model saw it, with every patch veiled that is not in ``kept``.

        ``kept`` counts from this image's first position, and ``grid`` is (rows, columns) of its tiles.
        """
        layer = Image.new("RGBA", shown.size, (0, 0, 0, 0))
        canvas = ImageDraw.Draw(layer)
        stays = set(kept)
        for position, (left, top, right, bottom) in self._patches(shown, size, grid):
            if position not in stays:
                canvas.rectangle((left, top, right - 1, bottom - 1), fill=tuple(colour))
        return Image.alpha_composite(shown.convert("RGBA"), layer).convert("RGB")

    def _patches(
        self, shown: Image.Image, size: tuple[int, int], grid: tuple[int, int]
    ) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Each position that is on ``shown``, with the patch's left, top, right and bottom there."""
        across, down = shown.width / size[0], shown.height / size[1]
        for position in range(grid[0] * grid[1] * self.tokens):
            box = self.box(position, grid, size)
            if box:
                left, right = round(box[0] * across), round(box[2] * across)
                top, bottom = round(box[1] * down), round(box[3] * down)
                if left < min(right, shown.width) and top < min(bottom, shown.height):
                    yield position, (left, top, right, bottom)


def _colour(number: int) -> tuple[int, int, int, int]:
    """Of the ``number``-th region: by the golden ratio, so that those near in number differ."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue), 110
