from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn
import torch
from PIL import Image

from pipeline import images, pictures
from pipeline.images import Normaliser, Tiler
from pipeline.model import find_checkpoint, load_processor
from pipeline.pictures import ImageError


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def mean(image: Image.Image) -> list[float]:
    assert image.mode == "RGB"
    return [float(c) for c in np.asarray(image).reshape(-1, 3).mean(0)]


RED = Image.new("RGB", (60, 40), (200, 30, 30))


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (RED, "PNG", (200, 30, 30)),
        (RED, "JPEG", (200, 30, 30)),
        (RED, "WEBP", (200, 30, 30)),
        (RED, "BMP", (200, 30, 30)),
        (RED, "GIF", (200, 30, 30)),
        (RED, "TIFF", (200, 30, 30)),
        (RED, "PPM", (200, 30, 30)),
        (RED.quantize(4), "PNG", (200, 30, 30)),
        (RED.convert("CMYK"), "JPEG", (200, 30, 30)),
        (RED.convert("CMYK"), "TIFF", (200, 30, 30)),
        (RED.convert("YCbCr"), "TIFF", (200, 30, 30)),
        (RED.convert("L"), "JPEG", (81, 81, 81)),
        (Image.new("1", (60, 40), 1), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (60, 40), (0, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (60, 40), (0, 0, 0, 127)), "PNG", (128, 128, 128)),
        (Image.new("LA", (60, 40), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("I;16", (60, 40), 32896), "PNG", (128, 128, 128)),
        (Image.new("I;16", (60, 40), 200), "TIFF", (1, 1, 1)),
        (Image.new("I", (60, 40), 32896), "TIFF", (128, 128, 128)),
        (Image.new("F", (60, 40), 0.5), "TIFF", (128, 128, 128)),
        (Image.new("LAB", (60, 40), (255, 128, 128)), "TIFF", (255, 255, 255)),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(image: Image.Image, format: str, expected: tuple[int, ...]) -> None:
    data = encoded(image, format)
    decoded = pictures.decode(data)
    assert decoded.size == (60, 40)
    assert mean(decoded) == pytest.approx(expected, abs=4)


def test_transparent_palette() -> None:
    image = Image.new("P", (60, 40), 0)
    image.putpalette([10, 20, 30, 200, 30, 30])
    assert mean(pictures.decode(encoded(image, "PNG", transparency=0))) == [255, 255, 255]
    assert mean(pictures.decode(encoded(image, "GIF", transparency=0))) == [255, 255, 255]
    assert mean(pictures.decode(encoded(image, "PNG", transparency=1))) == [10, 20, 30]
    assert mean(pictures.decode(encoded(RED, "PNG", transparency=(200, 30, 30)))) == [255, 255, 255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (60, 40), c) for c in ((200, 30, 30), (0, 0, 0), (9, 9, 9))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert mean(pictures.decode(data)) == pytest.approx([200, 30, 30], abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (60, 40))
    upright.paste((250, 250, 250), (0, 0, 30, 20))  # white in the upper left
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    assert np.array_equal(np.asarray(pictures.decode(data)), np.asarray(upright))


def test_a_broken_exif_block_spoils_nothing(picture: Callable[..., bytes]) -> None:
    data = encoded(Image.open(io.BytesIO(picture())), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert pictures.decode(data).size == (100, 80)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, depth: int = 8, colours: int = 2, interlaced: bool = False) -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields)


def png_claiming(width: int, height: int) -> bytes:
    """It has no pixels."""
    return png_header(width, height) + chunk(b"IEND", b"")


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


def png(depth: int, colours: int, row: bytes, *before: tuple[bytes, bytes], width: int) -> bytes:
    """A PNG of one row, written by hand: Pillow writes none of most of these."""
    chunks = b"".join(chunk(kind, body) for kind, body in before)
    return png_header(width, 1, depth, colours) + chunks + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def wide(*values: int) -> bytes:
    """Numbers of 16 bits."""
    return struct.pack(f">{len(values)}H", *values)


NEARLY = wide(0x1234, 0x2000, 0x3001, 0x1234, 0x2000, 0x3000, 0x1212, 0x2020, 0x3030)
"""The transparent colour between two that differ from it in their lower bytes."""
COLOURS = (b"PLTE", bytes([10, 20, 30, 200, 30, 30, 0, 0, 0, 9, 9, 9]))
WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(1, GREY, b"\x40", (b"tRNS", wide(0)), width=2), [255, 255]),
        (png(1, GREY, b"\x40", (b"tRNS", wide(1)), width=2), [0, 255]),
        # Samples 0, 1, 2 and 3.
        (png(2, GREY, b"\x1b", (b"tRNS", wide(1)), width=4), [0, 255, 170, 255]),
        (png(2, GREY, b"\x1b", width=4), [0, 85, 170, 255]),
        # Samples 0, 1, 5 and 15.
        (png(4, GREY, b"\x01\x5f", (b"tRNS", wide(5)), width=4), [0, 17, 255, 255]),
        (png(8, GREY, b"\x07\x09", (b"tRNS", wide(7)), width=2), [255, 9]),
        (png(16, GREY, wide(0x1234, 0x1235, 0x3412), (b"tRNS", wide(0x1234)), width=3), [255, 18, 52]),
        (png(16, GREY, wide(0, 300, 65535), (b"tRNS", wide(0)), width=3), [255, 1, 255]),
        (png(8, RGB, b"\x07\x08\x09\x07\x08\x0a", (b"tRNS", wide(7, 8, 9)), width=2), [WHITE, [7, 8, 10]]),
        (
            png(16, RGB, NEARLY, (b"tRNS", wide(0x1234, 0x2000, 0x3000)), width=3),
            [[18, 32, 48], WHITE, [18, 32, 48]],
        ),
        (png(16, RGB, NEARLY, width=3), [[18, 32, 48]] * 3),
        (png(1, PALETTE, b"\x40", COLOURS, (b"tRNS", b"\0"), width=2), [WHITE, [200, 30, 30]]),
        # The third half clear; the fourth, which the chunk leaves out, not at all.
        (png(2, PALETTE, b"\x1b", COLOURS, (b"tRNS", b"\xff\0\x80"), width=4), [[10, 20, 30], WHITE, [127] * 3, [9] * 3]),
        (png(16, GREY_ALPHA, wide(0, 0, 0, 0x8080, 0x8080, 0xFFFF), width=3), [255, 127, 128]),
        (png(16, RGB_ALPHA, wide(0, 0, 0, 0, 0x8080, 0, 0, 0xFFFF), width=2), [WHITE, [128, 0, 0]]),
    ],
    ids=[
        "1-black",
        "1-white",
        "2",
        "2-opaque",
        "4",
        "8",
        "16",
        "16-black",
        "rgb-8",
        "rgb-16",
        "rgb-16-opaque",
        "palette-1",
        "palette-2",
        "grey-alpha-16",
        "rgb-alpha-16",
    ],
)
def test_transparency_of_every_kind_of_png(data: bytes, expected: list[Any]) -> None:
    pixels = [[value] * 3 if isinstance(value, int) else value for value in expected]
    assert np.asarray(pictures.decode(data)).tolist() == [pixels]


def test_a_transparent_colour_of_an_interlaced_and_turned_png() -> None:
    """Two pixels, each by itself in a pass; the tag says that their row is a column, upside down."""
    exif = Image.Exif()
    exif[0x0112] = 8
    chunks = chunk(b"tRNS", wide(0x1234, 0x2000, 0x3000)) + chunk(b"eXIf", exif.tobytes()[6:])
    rows = zlib.compress(b"\0" + wide(0x1234, 0x2000, 0x3000) + b"\0" + wide(0x1235, 0x2000, 0x3000))
    data = png_header(2, 1, 16, RGB, interlaced=True) + chunks + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert np.asarray(pictures.decode(data)).tolist() == [[[18, 32, 48]], [WHITE]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_a_transparent_value_of_wide_samples(mode: str) -> None:
    image = Image.new(mode, (2, 1), 25700)
    image.putpixel((1, 0), 25701)
    image.info["transparency"] = 25701
    assert np.asarray(pictures.rgb(image)).tolist() == [[[100] * 3, WHITE]]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"not an image", "not an image"),
        (b"", "not an image"),
        (b"<svg></svg>", "not an image"),
        (png_claiming(5000, 4001), "over 20 megapixels"),
        (png_claiming(60000, 60000), "pixels"),
        (png_claiming(2**31 - 1, 1), "pixels"),
        (png_claiming(101, 1), "over 100:1"),
        (png_claiming(20000, 20), "over 100:1"),
        (png_claiming(100, 100), "can't be decoded"),
        (encoded(RED, "PNG")[:-30], "can't be decoded"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "can't be decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_answered_is_said_in_words(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        pictures.decode(data)


def test_the_bounds_themselves_are_answered() -> None:
    assert pictures.decode(encoded(Image.new("L", (500, 5)), "PNG")).size == (500, 5)
    assert pictures.decode(encoded(Image.new("1", (5000, 4000)), "PNG")).size == (5000, 4000)
    assert pictures.decode(encoded(Image.new("L", (1, 1)), "PNG")).size == (1, 1)


def test_digest(picture: Callable[..., bytes]) -> None:
    one, two = picture(seed=1), picture(seed=2)
    first, second = images.digest(one), images.digest(two)
    assert first == images.digest(one) != second
    assert images.row_digest([]) is None
    assert images.row_digest([first]) == first
    assert images.row_digest([first, second]) not in (first, second, images.row_digest([second, first]))


SIZES = [(100, 80), (112, 112), (300, 80), (80, 300), (230, 230), (700, 30), (1, 1), (640, 480), (113, 7), (448, 112)]


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_pixels_equal_the_processors(checkpoint_folder: str, picture: Callable[..., bytes], backend: str) -> None:
    processor = load_processor(find_checkpoint(checkpoint_folder, None))
    if backend == "torchvision":
        pytest.importorskip("torchvision")
        from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor

        processor.image_processor = MllamaImageProcessor.from_pretrained(checkpoint_folder)
    decoded = [pictures.decode(picture(*size, seed=i)) for i, size in enumerate(SIZES)]
    batch = [[decoded[0]], decoded[1:3], decoded[3:6], decoded[6:7], decoded[7:9], [decoded[9]]]
    expected = processor.image_processor(batch, return_tensors="pt")

    tiler, normalise = Tiler(processor), Normaliser(processor, torch.device("cpu"), torch.float32)
    tiles = [[tiler(p) for p in row] for row in batch]
    assert all(t.pixels.dtype == torch.uint8 for row in tiles for t in row)
    assert [[len(t.pixels) for t in row] for row in tiles] == [list(row) for row in expected["num_tiles"]]
    assert [[tiler.tile_count(*p.size) for p in row] for row in batch] == [list(row) for row in expected["num_tiles"]]
    for row, (ours, pixels) in enumerate(zip(tiles, expected["pixel_values"], strict=True)):
        for i, image in enumerate(ours):
            count = len(image.pixels)
            assert (normalise(image.pixels) - pixels[i, :count]).abs().max() <= 1e-6
            # What the processor has for padding tiles is what the engine takes them for.
            assert not pixels[i, count:].any()
            assert image.ratio_id == expected["aspect_ratio_ids"][row, i]


FEWER = [*SIZES, (561, 560), (90, 330), (330, 100), (225, 224), (500, 500), (2000, 90), (50, 900), (100, 170)]
"""Images of 1 to 4 tiles and of every grid that the model has."""


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_fewer_tiles_keep_the_models_numbers(checkpoint_folder: str, picture: Callable[..., bytes], most: int) -> None:
    """Numbered among the grids that are left, as the processor has it, an image of two tiles in a row would be the model's
    one above the other above the other."""
    checkpoint = find_checkpoint(checkpoint_folder, None)
    processor = load_processor(checkpoint)
    model_tiles = checkpoint.config["vision_config"]["max_num_tiles"]
    table = checkpoint.config["vision_config"]["supported_aspect_ratios"]
    own, tiler = Tiler(processor), Tiler(processor, most, model_tiles)
    normalise = Normaliser(processor, torch.device("cpu"), torch.float32)
    seen = set()
    for seed, size in enumerate(FEWER):
        image = pictures.decode(picture(*size, seed=seed))
        tiles = tiler(image)
        expected = processor.image_processor([[image]], max_image_tiles=most, return_tensors="pt")
        count = int(expected["num_tiles"][0][0])
        assert len(tiles.pixels) == tiles.grid[0] * tiles.grid[1] == tiler.tile_count(*image.size) == count <= most
        assert (normalise(tiles.pixels) - expected["pixel_values"][0, 0, :count]).abs().max() <= 1e-6
        assert tuple(table[tiles.ratio_id - 1]) == tiles.grid
        seen.add(tiles.grid)
        whole = own(image)
        # The canvases that are left are some of the model's; whoever has the best of all among them keeps it.
        if len(whole.pixels) <= most:
            assert (tiles.grid, tiles.ratio_id) == (whole.grid, whole.ratio_id)
            assert torch.equal(tiles.pixels, whole.pixels)
        else:
            assert len(tiles.pixels) < len(whole.pixels)
    assert seen == {tuple(grid) for grid in table if grid[0] * grid[1] <= most}


def test_the_models_own_table_numbers_what_a_processor_of_fewer_tiles_cuts(
    checkpoint_folder: str, picture: Callable[..., bytes]
) -> None:
    """A checkpoint whose preprocessor_config.json has been turned down, as users do to save tiles."""
    processor = load_processor(find_checkpoint(checkpoint_folder, None))
    wide = pictures.decode(picture(440, 100))
    expected = Tiler(processor, 2)(wide)
    processor.image_processor.max_image_tiles = 2
    tiles = Tiler(processor, model_tiles=4)(wide)
    assert (tiles.grid, tiles.ratio_id) == (expected.grid, expected.ratio_id) == ((1, 2), 2)
    tall = Tiler(processor, model_tiles=4)(pictures.decode(picture(100, 440)))
    # The third of two tiles' grids, and the fifth of four's.
    assert (tall.grid, tall.ratio_id) == ((2, 1), 5)
    assert torch.equal(tiles.pixels, expected.pixels)
    assert Tiler(processor, 3, 4).max_tiles == 3


@pytest.mark.parametrize("most", [0, 5])
def test_no_more_tiles_than_the_model_takes(checkpoint_folder: str, most: int) -> None:
    with pytest.raises(ValueError, match=f"max_tiles={most} is not in 1 to 4"):
        Tiler(load_processor(find_checkpoint(checkpoint_folder, None)), most)


def test_grids_are_rows_and_columns(checkpoint_folder: str, picture: Callable[..., bytes]) -> None:
    tiler = Tiler(load_processor(find_checkpoint(checkpoint_folder, None)))
    wide = tiler(pictures.decode(picture(440, 100)))
    assert wide.grid == (1, 4)
    assert wide.pixels.shape == (4, 3, 112, 112)
    assert tiler(pictures.decode(picture(100, 330))).grid == (3, 1)


def test_real_photographs() -> None:
    """Every picture that scikit-image's and scikit-learn's wheels hold."""
    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images"]
    files = [f for folder in folders for f in sorted(folder.iterdir()) if f.suffix in (".png", ".jpg", ".jpeg", ".gif", ".tif")]
    loaded = 0
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
        except Exception:  # noqa: BLE001 - scikit-image's folder holds some that Pillow can't load
            with pytest.raises(ImageError):
                pictures.decode(file.read_bytes())
            continue
        assert pictures.decode(file.read_bytes()).mode == "RGB", file
        loaded += 1
    assert loaded >= 20
