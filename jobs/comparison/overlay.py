"""Kept features drawn over an image: where each patch lies on it, and a veil over the patches that were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

VEIL = (58, 62, 76, 205)


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
        across, down = shown.width / size[0], shown.height / size[1]
        layer = Image.new("RGBA", shown.size, (0, 0, 0, 0))
        canvas = ImageDraw.Draw(layer)
        stays = set(kept)
        for position in range(grid[0] * grid[1] * self.tokens):
            box = self.box(position, grid, size)
            if box and position not in stays:
                left, right = round(box[0] * across), round(box[2] * across)
                top, bottom = round(box[1] * down), round(box[3] * down)
                if left < min(right, shown.width) and top < min(bottom, shown.height):
                    canvas.rectangle((left, top, right - 1, bottom - 1), fill=tuple(colour))
        return Image.alpha_composite(shown.convert("RGBA"), layer).convert("RGB")
