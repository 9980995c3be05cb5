"""What both sides are given: JPEG files, prompts, output lengths. The same seed gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.model import ModelSize, words

# Width and height at the model's own tile of 560 pixels, by the tiles they are cut into: COCO's commonest size, a square, a
# larger photograph. They shrink with the tile.
TILE = 560
SIZES = {1: (512, 512), 2: (640, 480), 4: (800, 600)}
# Twenty images: COCO-like, mostly two tiles.
TILE_MIX = (2,) * 14 + (1,) * 3 + (4,) * 3
CAPTION_LENGTHS = tuple(round(length) for length in np.linspace(8, 96, len(TILE_MIX)))
CAPTION_PROMPT = 32
LONG_LENGTHS = tuple(range(32, 97, 8))
ANSWER_LENGTHS = tuple(range(1, 17))
QUESTION_PROMPTS = tuple(range(20, 41))
QUESTIONS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt about one image, and how many tokens its answer has."""

    image: int
    """Place in the workload's images."""
    prompt: str
    """Without the image's token and the begin of text."""
    length: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows in the order in which they come."""

    images: tuple[bytes, ...]
    """JPEG files, all different."""
    tiles: tuple[int, ...]
    """Real tiles of each image."""
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Output tokens of all rows."""
        return sum(row.length for row in self.rows)

    def first(self, rows: int) -> Workload:
        """The first ``rows`` rows and the images they need, which come in the rows' order."""
        taken = self.rows[:rows]
        images = taken[-1].image + 1
        return Workload(self.images[:images], self.tiles[:images], taken)

    def cut(self, length: int) -> Workload:
        """The same prompts, answered with ``length`` tokens each."""
        return replace(self, rows=tuple(replace(row, length=length) for row in self.rows))


def captioning(images: int, seed: int, size: ModelSize) -> Workload:
    """One prompt for all images, as a captioning job has it; lengths spread over 8 to 96 tokens."""
    draw = np.random.default_rng([seed, 1])
    prompt = _text(CAPTION_PROMPT, draw, size)
    tiles = _blocks(TILE_MIX, images, draw)
    lengths = _blocks(CAPTION_LENGTHS, images, draw)
    return Workload(_files(tiles, draw, size), tiles, tuple(Row(i, prompt, lengths[i]) for i in range(images)))


def questions(
    images: int, seed: int, size: ModelSize, per_image: int = QUESTIONS, tile_mix: Sequence[int] = TILE_MIX
) -> Workload:
    """Questions about an image one after the other, of 20 to 40 tokens; answers of 1 to 16."""
    draw = np.random.default_rng([seed, 2])
    count = images * per_image
    tiles = _blocks(tile_mix, images, draw)
    prompts = [_text(length, draw, size) for length in _blocks(QUESTION_PROMPTS, count, draw)]
    lengths = _blocks(ANSWER_LENGTHS, count, draw)
    rows = tuple(Row(i // per_image, prompts[i], lengths[i]) for i in range(count))
    return Workload(_files(tiles, draw, size), tiles, rows)


def four_tiles(images: int, seed: int, size: ModelSize) -> Workload:
    """Captioning of four-tile images with answers of 32 to 96 tokens: a steady load for decoding."""
    draw = np.random.default_rng([seed, 3])
    prompt = _text(CAPTION_PROMPT, draw, size)
    tiles = (4,) * images
    lengths = _blocks(LONG_LENGTHS, images, draw)
    return Workload(_files(tiles, draw, size), tiles, tuple(Row(i, prompt, lengths[i]) for i in range(images)))


def _blocks(values: Sequence[int], count: int, draw: np.random.Generator) -> tuple[int, ...]:
    """``count`` draws, each run of ``len(values)`` a shuffle of ``values``: a part of a workload is like the whole."""
    out: list[int] = []
    while len(out) < count:
        out += draw.permutation(values).tolist()
    return tuple(out[:count])


def _text(tokens: int, draw: np.random.Generator, size: ModelSize) -> str:
    """Random words for a prompt of ``tokens`` tokens, the image's and the begin of text counted in."""
    return " ".join(draw.choice(words(size), tokens - 2))


def _files(tiles: Sequence[int], draw: np.random.Generator, size: ModelSize) -> tuple[bytes, ...]:
    """Smooth random patterns, as JPEG."""
    files = []
    for count in tiles:
        width, height = (side * size.tile // TILE for side in SIZES[count])
        spots = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        out = io.BytesIO()
        spots.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return tuple(files)
