"""From an RGB image to uint8 tiles on the CPU, and from tiles to the model's pixels on its device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from transformers import MllamaProcessor


@dataclass(frozen=True, slots=True)
class Tiles:
    """One image as the processor cuts it.

    ``pixels`` is uint8 (tiles, 3, side, side), its real tiles only; ``grid`` their (rows, columns); ``ratio_id`` the model's
    number for this grid, from 1.
    """

    pixels: Tensor
    grid: tuple[int, int]
    ratio_id: int


def digest(data: bytes) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(data).hexdigest()


def row_digest(digests: Sequence[str]) -> str | None:
    """A row's images as one: its one file's digest, or a digest of the digests; None without files."""
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


class Tiler:
    """The processor's own resizing, padding and cutting, left in uint8.

    Normalised fp32 pixels, padded to the most tiles, are 16 times as many bytes as the uint8 real tiles at one tile an image.

    Args:
        processor: the checkpoint's.
        max_tiles: most tiles an image is cut into; default: the processor's own.
        model_tiles: the model's ``max_num_tiles``; default: the processor's own. It numbers the grids: the model has learnt an
            embedding for each ``ratio_id``, whatever part of its grids images are cut to.

    Raises ``ValueError`` where an image could come out in more tiles than the model takes.
    """

    def __init__(self, processor: MllamaProcessor, max_tiles: int | None = None, model_tiles: int | None = None) -> None:
        from transformers.models.mllama.image_processing_pil_mllama import (
            get_all_supported_aspect_ratios,
            get_optimal_tiled_canvas,
        )

        self.processor = processor.image_processor
        own: int = self.processor.max_image_tiles
        self.max_tiles = own if max_tiles is None else max_tiles
        model_tiles = own if model_tiles is None else model_tiles
        if not 1 <= self.max_tiles <= model_tiles:
            raise ValueError(f"max_tiles={self.max_tiles} is not in 1 to {model_tiles}, which the model takes; set it so")
        size = self.processor.size
        self.side = int(size["height"])
        self.grids: list[tuple[int, int]] = get_all_supported_aspect_ratios(model_tiles)
        self._allowed: list[tuple[int, int]] = get_all_supported_aspect_ratios(self.max_tiles)
        self._canvas = get_optimal_tiled_canvas

    def tile_count(self, width: int, height: int) -> int:
        """Real tiles of an image of this size."""
        tall, wide = self._canvas(height, width, self.max_tiles, self.side)
        return int(tall // self.side) * int(wide // self.side)

    def __call__(self, image: Image.Image) -> Tiles:
        out = self.processor(
            [[image]], max_image_tiles=self.max_tiles, do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        # The processor numbers the grids that it may choose from: the same grid has another number among the model's.
        rows, columns = grid = self._allowed[int(out["aspect_ratio_ids"][0, 0]) - 1]
        pixels = out["pixel_values"][0, 0, : rows * columns].round().to(torch.uint8)
        return Tiles(pixels, grid, self.grids.index(grid) + 1)


class Normaliser:
    """Rescales and normalises tiles on the device, to what the processor computes on the CPU."""

    def __init__(self, processor: MllamaProcessor, device: torch.device, dtype: torch.dtype) -> None:
        images: Any = processor.image_processor
        self.scale = float(images.rescale_factor) if images.do_rescale else 1.0
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.mean = torch.tensor(mean, device=device, dtype=torch.float32).view(3, 1, 1)
        self.std = torch.tensor(std, device=device, dtype=torch.float32).view(3, 1, 1)
        self.device, self.dtype = device, dtype

    def __call__(self, tiles: Tensor) -> Tensor:
        """Pixels of uint8 ``tiles`` (n, 3, side, side). Padding inside a real tile is black before this, as the processor's."""
        pixels = tiles.to(self.device, non_blocking=True).float()
        return ((pixels * self.scale - self.mean) / self.std).to(self.dtype)
