"""What is to be estimated: the images and questions, the engine's options, and the memory that rows share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jobs.estimation.schedule import Row
from trimming.engine.memory import LEAST_SPARE, slack
from trimming.engine.request import KeptSets
from trimming.tower import TowerPolicy, TowerTiles

DEFAULT_TILES: dict[int, float] = {1: 0.15, 2: 0.70, 4: 0.15}
"""Shares of images by real tiles: like COCO's photographs, mostly 640 × 480, which is two tiles (make bench's mix). Larger
photographs have four: state --tiles 4 for those."""
DEFAULT_PROMPT, DEFAULT_OUTPUT = 32, 64
"""Tokens: a sentence in the chat template; the jobs' own --max-new-tokens."""
CPU_KV = 4 << 30
"""What the engine takes of a machine's memory at most, unless it is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Rows and how they are answered. Token counts are means."""

    images: int
    questions: float
    """About each image; the rows of one image come one after the other."""
    tiles: Mapping[int, float]
    """Shares of images by real tiles, adding up to 1."""
    prompt: float
    output: float
    longest: int
    """Answers are cut off at so many tokens, which each slot is reserved for."""
    batch_size: int
    tower_tiles: TowerTiles = "pooled"
    tower_policy: TowerPolicy | None = None
    image_cache: bool = True
    kept_sets: KeptSets = "image"
    merged: bool = False
    """What stays of an image is left once its alike features are merged, before any question is read."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images={self.images} must be at least 1")
        if self.questions < 1:
            raise ValueError(f"questions={self.questions:g} must be at least 1 an image")
        if self.prompt < 1 or self.output < 1:
            raise ValueError(f"prompt_tokens={self.prompt:g} and output_tokens={self.output:g} must be at least 1")
        if self.longest < self.output:
            raise ValueError(f"max_new_tokens={self.longest} is under output_tokens={self.output:g}; raise it")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    @property
    def mean_tiles(self) -> float:
        return sum(tiles * share for tiles, share in self.tiles.items())

    def sharing(self, keep: float) -> float:
        """Rows that share a kept set, as all about one image do where they decide together or keep everything."""
        return self.questions if self.kept_sets == "image" or self.merged or keep == 1 else 1.0

    def rows(self, count: int, keep: float, left: Callable[[int], int]) -> list[Row]:
        """The first ``count`` rows of a stream like this job's, always the same ones.

        Answers are spread evenly about their mean: from 1 token to twice the mean, or as far as the longest allows. Of a mean
        that is no whole number every row has the one below or above.

        Args:
            keep: share that stays of the visual tokens that the tower leaves, of every row.
            left: by tile count, how many the tower leaves.
        """
        spread = min(self.output - 1, self.longest - self.output)
        rows: list[Row] = []
        image = 0
        while len(rows) < count:
            tiles = self._tiles(_fraction(image, _SILVER))
            visual = left(tiles)
            kept = visual if keep == 1 else max(1, round(keep * visual))
            asked = math.floor((image + 1) * self.questions) - math.floor(image * self.questions)
            for _ in range(asked):
                number = len(rows)
                output = self.output + spread * (2 * _fraction(number, _GOLDEN) - 1)
                prompt = max(1, round(self.prompt))
                length = min(self.longest, max(1, _whole(output, _fraction(number, _BRONZE))))
                rows.append(Row(image, tiles, prompt, length, kept, prompt + self.longest))
            image += 1
        return rows[:count]

    def _tiles(self, at: float) -> int:
        """The tile count at ``at`` in [0, 1) of the images in the order of theirs."""
        reached = 0.0
        for tiles, share in sorted(self.tiles.items()):
            reached += share
            if at < reached:
                return tiles
        return max(self.tiles)


# Multiples of these, modulo 1, fill [0, 1) evenly from the first one on, and independently of each other.
_GOLDEN, _SILVER, _BRONZE = math.sqrt(5) / 2 - 0.5, math.sqrt(2) - 1, math.sqrt(13) / 2 - 1.5


def _fraction(number: int, step: float) -> float:
    return (number + 0.5) * step % 1


def _whole(value: float, at: float) -> int:
    """``value`` rounded down or up, up as often as its fraction says; ``at`` in [0, 1) decides."""
    return math.floor(value) + (at < value % 1)


def read_tiles(text: str, most: int) -> dict[int, float]:
    """Shares by tile count from ``2.3`` (a mean: the two whole numbers around it) or ``1:0.2,4:0.8``. Raises ``ValueError``."""
    wrong = f"tiles={text!r} is neither a mean from 1 to {most} nor shares such as 1:0.2,4:0.8 that add up to 1"
    try:
        if ":" not in text:
            mean = float(text)
            if not 1 <= mean <= most:
                raise ValueError
            below = min(math.floor(mean), most - 1)
            return {tiles: share for tiles, share in ((below, below + 1 - mean), (below + 1, mean - below)) if share > 0}
        found: dict[int, float] = {}
        for part in text.split(","):
            tiles, share = part.split(":")
            if int(tiles) in found or not 1 <= int(tiles) <= most or not 0 <= float(share) <= 1:
                raise ValueError
            found[int(tiles)] = float(share)
    except ValueError:
        raise ValueError(wrong) from None
    total = sum(found.values())
    if not 0.98 < total < 1.02:
        raise ValueError(wrong)
    return {tiles: share / total for tiles, share in found.items() if share > 0}


def cut(tiles: Mapping[int, float], most: int | None) -> dict[int, float]:
    """Shares under ``--max-tiles``: what had more has that many. A square image has fewer at 2 and 3."""
    found: dict[int, float] = {}
    for count, share in tiles.items():
        at = count if most is None else min(count, most)
        found[at] = found.get(at, 0.0) + share
    return found


def kv_room(memory: float, gpus: int, weights: float, image_cache: float, activations: float) -> float:
    """Bytes for keys and values of an actor, as ``trimming.engine.memory.spare_bytes`` has it: what its GPUs have, less the
    weights, the image cache, and on each ``slack`` and the activations.

    Args:
        memory: of one GPU. Layers are taken to be shared out evenly.
        activations: of one GPU, ``Costs.activations``.

    Raises ``ValueError`` where not even the weights fit, with how many GPUs would do.
    """

    def room(count: int) -> float:
        return count * (memory - slack(memory) - activations) - weights - image_cache

    if room(gpus) >= LEAST_SPARE:
        return room(gpus)
    said = f"the weights' {weights / 1e9:.0f} GB do not fit {gpus} × {memory / 1e9:.0f} GB with room for activations"
    enough = next((count for count in range(gpus + 1, 65) if room(count) >= LEAST_SPARE), None)
    raise ValueError(f"gpus_per_actor={gpus}: {said}" + (f"; use --gpus-per-actor {enough}" if enough else ""))
