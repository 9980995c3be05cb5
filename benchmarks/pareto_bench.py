"""Answering the demo's questions under one policy after another, on one block of a data set: a cell of ``make pareto``."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.pareto_contenders import View, Way
from demo.answerer import LIMITS, Answerer
from demo.shards import Row
from pipeline.engine import Engine, Prompt
from pipeline.images import Tiler, Tiles, digest
from pipeline.pictures import decode
from trimming import Policy, VisionZip
from trimming.engine import KeptSets
from trimming.engine.images import ImageCache

Cell = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """Rows by image, cut into blocks of every ``blocks``-th image."""

    name: str
    images: Sequence[Sequence[Row]]
    blocks: int

    def block(self, number: int) -> list[Row]:
        return [row for image in self.images[number :: self.blocks] for row in image]

    @property
    def rows(self) -> list[Row]:
        """In the order of the blocks."""
        return [row for number in range(self.blocks) for row in self.block(number)]


class Bench:
    """A demo model with an engine for each kind of policy, all of which share what any of them encoded.

    Kinds, since an engine is made for one way of keeping sets, refuses to change between policies that slice keys and those
    that don't, and drops encoded images when a policy looks at the tower's attention and the one before did not.
    """

    def __init__(self, model: Path) -> None:
        self.answerer, self.weights = Answerer(model), model / "model.safetensors"
        self._engines: dict[tuple[KeptSets, bool, bool], Engine] = {}
        self._tilers: dict[int | None, Tiler] = {}
        self._tiles: dict[tuple[str, View], Tiles] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._seen: set[tuple[str, View]] = set()
        # What is loaded by now stays: a collection that looked at it would take a quarter of a second before every cell.
        gc.freeze()

    def engine(self, policy: Policy, kept_sets: KeptSets) -> Engine:
        kind = (kept_sets, policy.slices, "class_attention" in policy.looks_at)
        if kind in self._engines:
            self._engines[kind].batch.use(policy)
        else:
            self._engines[kind] = self.answerer.engine(policy, kept_sets=kept_sets)
        return self._engines[kind]

    def see(self, rows: Sequence[Row], view: View) -> Cell:
        """Encodes each image that is new, so that no policy pays for it, with the tower's attention, which one policy looks at.
        How many, and the tower's seconds."""
        new = {key: row for row in rows if (key := (digest(row.image), view)) not in self._seen}
        cell = self._answers(self.engine(VisionZip(0.5), "image"), list(new.values()), view, self._tiles)
        self._seen.update(new)
        return {name: cell[name] for name in ("images_encoded", "tower")}

    def answers(self, policy: Policy, rows: Sequence[Row], view: View, kept_sets: KeptSets = "image") -> Cell:
        """At equal held bytes: by images that the tower has seen before."""
        self.see(rows, view)
        return self._answers(self.engine(policy, kept_sets), rows, view, self._tiles)

    def end_to_end(self, way: Way, rows: Sequence[Row]) -> Cell:
        """The rows with nothing known of their images: each is decoded, cut and sent through the tower once, for all questions
        about it, by an engine of its own, whose making is not timed."""
        view = way.view
        engine = self.answerer.engine(way.policy, view.tower_tiles, tower_policy=view.tower_policy)
        engine.batch.images = ImageCache(LIMITS.image_cache_bytes)
        # What all ways share is there before any of them: texts' tokens, and the tiler.
        for row in rows:
            self.answerer.tokens(row.question, 1)
        self._tiler(view)
        return self._answers(engine, rows, view, {})

    def _answers(self, engine: Engine, rows: Sequence[Row], view: View, known: dict[tuple[str, View], Tiles]) -> Cell:
        """What the rows came to: right or wrong as a string of 1 and 0, the images' keys and values that were held (the most
        bytes at once, and bytes times seconds), the tower's share that was left, tokens and seconds of all of them. ``known``
        has images that were cut before, and gets those that were not."""
        engine.batch.reset_statistics()
        # No cell pays for the last one's garbage.
        gc.collect()
        began = time.perf_counter()
        prompts = [self._prompt(row, view, known) for row in rows]
        prepared = time.perf_counter()
        said = engine.generate(prompts)
        wall = time.perf_counter() - prepared
        return {
            "policy": repr(engine.batch.policy),
            "rows": len(rows),
            "right": "".join("01"[answer.text == row.answer] for answer, row in zip(said, rows, strict=True)),
            "held_bytes": engine.batch.statistics.peak_cross_kv_bytes,
            "held_byte_seconds": engine.batch.statistics.cross_kv_byte_seconds,
            "output_tokens": sum(answer.output_tokens for answer in said),
            "images_encoded": engine.batch.statistics.images_encoded,
            "tower_keep_fraction": statistics.fmean(answer.tower_keep_fraction or 0.0 for answer in said) if said else 0.0,
            "preparing": round(prepared - began, 4),
            **{name: round(engine.batch.seconds[name], 4) for name in ("tower", "prefill", "decode")},
            "wall": round(wall, 4),
        }

    def tiles(self, rows: Sequence[Row], view: View) -> int:
        """Of all rows' images, by their sizes alone."""
        tiler = self._tiler(view)
        return sum(tiler.tile_count(*scaled(self._size(row), view.scale)) for row in rows)

    def _size(self, row: Row) -> tuple[int, int]:
        key = digest(row.image)
        if key not in self._sizes:
            self._sizes[key] = decode(row.image).size
        return self._sizes[key]

    def _tiler(self, view: View) -> Tiler:
        if view.max_tiles not in self._tilers:
            model_tiles = self.answerer.model.config.vision_config.max_num_tiles
            self._tilers[view.max_tiles] = Tiler(self.answerer.processor, view.max_tiles, model_tiles)
        return self._tilers[view.max_tiles]

    def _prompt(self, row: Row, view: View, known: dict[tuple[str, View], Tiles]) -> Prompt:
        key = (digest(row.image), view)
        if key not in known:
            image = decode(row.image)
            if view.scale != 1:
                image = image.resize(scaled(image.size, view.scale), Image.Resampling.LANCZOS)
            known[key] = self._tiler(view)(image)
        return Prompt(row.id, self.answerer.tokens(row.question, 1), [known[key]], [f"{key[0]} {view}"])


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
