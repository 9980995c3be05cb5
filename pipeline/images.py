"""From an image file's bytes to uint8 tiles on the CPU, and from tiles to the model's pixels on its device."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    from transformers import MllamaProcessor

MAX_PIXELS = 20_000_000
MAX_ASPECT = 100


class ImageError(ValueError):
    """Why an image can't be answered, in words for the row's ``error``."""


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


def header(data: bytes) -> tuple[int, int]:
    """(width, height) as shown, read without decoding. Raises ``ImageError`` for no image and for one out of bounds."""
    with _opened(data) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def decode(data: bytes) -> Image.Image:
    """The first frame as RGB, upright. Raises ``ImageError`` for whatever Pillow can't load and for images out of bounds."""
    with _opened(data) as image:
        try:
            image.load()
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them: all of it is this row's error
            raise ImageError(f"the image can't be decoded: {_said(error)}") from error
        _check_size(image)
        try:
            upright = _upright(image)
            return rgb(upright)
        except Exception as error:  # as above
            raise ImageError(f"an image of mode {image.mode} can't be turned into RGB: {_said(error)}") from error


def _opened(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not an image that Pillow can read ({len(data)} bytes)") from error
    except Exception as error:  # see decode
        raise ImageError(f"the image can't be opened: {_said(error)}") from error
    _check_size(image)
    return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is over {MAX_PIXELS // 1_000_000} megapixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{width} x {height} is over {MAX_ASPECT}:1")


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - a broken EXIF block spoils nothing but itself
        return 1


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - a broken EXIF block spoils nothing but itself
        return image


def rgb(image: Image.Image) -> Image.Image:
    """RGB of an image in any mode: transparency over white, 16 and 32 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """An 8-bit grey image of 16-bit, 32-bit or floating-point samples.

    16-bit samples are scaled by their type; wider ones, whose files don't say their range, by the range that they fit.
    """
    samples = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(samples.min()), float(samples.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0:
        ceilings = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next((c for c in ceilings if high <= c), high)
    span = high - low or 1.0
    return Image.fromarray(np.rint((samples - low) / span * 255).clip(0, 255).astype(np.uint8))


class Tiler:
    """The processor's own resizing, padding and cutting, left in uint8.

    Normalised fp32 pixels, padded to the most tiles, are 16 times as many bytes as the uint8 real tiles at one tile an image.
    """

    def __init__(self, processor: MllamaProcessor) -> None:
        from transformers.models.mllama.image_processing_pil_mllama import (
            get_all_supported_aspect_ratios,
            get_optimal_tiled_canvas,
        )

        self.processor = processor.image_processor
        self.max_tiles: int = self.processor.max_image_tiles
        size = self.processor.size
        self.side = int(size["height"])
        self.grids: list[tuple[int, int]] = get_all_supported_aspect_ratios(self.max_tiles)
        self._canvas = get_optimal_tiled_canvas

    def tile_count(self, width: int, height: int) -> int:
        """Real tiles of an image of this size."""
        tall, wide = self._canvas(height, width, self.max_tiles, self.side)
        return int(tall // self.side) * int(wide // self.side)

    def __call__(self, image: Image.Image) -> Tiles:
        out = self.processor([[image]], do_rescale=False, do_normalize=False, return_tensors="pt")
        ratio_id = int(out["aspect_ratio_ids"][0, 0])
        rows, columns = self.grids[ratio_id - 1]
        pixels = out["pixel_values"][0, 0, : rows * columns].round().to(torch.uint8)
        return Tiles(pixels, (rows, columns), ratio_id)


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
