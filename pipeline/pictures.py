"""From an image file's bytes to RGB. Imports little: this is what a decoding process runs (``pipeline.decoder``)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngImageFile

MAX_PIXELS = 20_000_000
MAX_ASPECT = 100


class ImageError(ValueError):
    """Why an image can't be answered, in words for the row's ``error``."""


def decode(data: bytes) -> Image.Image:
    """The first frame as RGB, upright. Raises ``ImageError`` for whatever Pillow can't load and for images out of bounds."""
    with _opened(data) as image:
        try:
            _load(image, data)
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


def _load(image: Image.Image, data: bytes) -> None:
    """Loads the samples of the file ``data`` and makes its transparent value one of them.

    Pillow leaves that value as a PNG file has it, and makes 8 bits of the samples: of grey of 2 and 4 bits, and of RGB of 16.
    """
    layout = image.tile[0].args if isinstance(image, PngImageFile) and image.tile else None
    image.load()
    value = image.info.get("transparency")
    if value is None:
        return
    if layout in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 0x55, "L;4": 0x11}[layout]
    elif layout == "RGB;16B":
        # Colours that differ in their lower bytes alone are two: read in the other byte order, the file gives those.
        with PngImageFile(io.BytesIO(data)) as lower:
            lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
            clear = (np.asarray(lower) == [v & 0xFF for v in value]).all(-1)
        clear &= (np.asarray(image) == [v >> 8 for v in value]).all(-1)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(~clear * np.uint8(255)))


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
    """An 8-bit grey image of 16-bit, 32-bit or floating-point samples, over white.

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
    grey = np.rint((samples - low) / span * 255).clip(0, 255).astype(np.uint8)
    if "transparency" in image.info:
        # A value of the samples as they were. Pillow's own conversions know it in 8 bits alone.
        grey[samples == image.info["transparency"]] = 255
    return Image.fromarray(grey)
