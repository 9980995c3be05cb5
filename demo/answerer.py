"""Answer rows with the demo model in this process, without Ray: what ``demo.table`` and ``demo.picture`` measure and draw.

The engine, the prompts and the tiles are those of ``python -m jobs.answer`` with greedy decoding. Encoded images outlive
an engine, since nothing in them depends on a policy: each image goes through the vision tower once for all questions and
policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from demo.shards import Row
from pipeline.config import Dtype
from pipeline.engine import Answer, Decoding, Engine, Limits, Prompt
from pipeline.images import Tiler, Tiles, digest
from pipeline.model import find_checkpoint, load_model, load_processor
from pipeline.pictures import decode
from pipeline.prompts import Prompter
from trimming import Policy
from trimming.engine import Completion, KeptSets
from trimming.engine.images import ImageCache
from trimming.tower import TowerPolicy, TowerTiles

MAX_NEW_TOKENS = 40
"""A caption of six objects with letters has 23 tokens, one of eight with numbers 39."""
LIMITS = Limits(kv_bytes=1 << 30)
"""Room for 256 rows at once, whose keys and values take 2.3 MB each at most, and for all test images, 0.1 to 0.8 MB each."""


@dataclass(frozen=True, slots=True)
class Answered:
    row: Row
    said: Answer
    tiles: int
    """Real tiles of its image."""

    @property
    def right(self) -> bool:
        return self.said.text == self.row.answer


class Answerer:
    """A loaded model and its processor, with the tiles and the encoded images that its engines have seen so far.

    Args:
        folder: the checkpoint's.
        device: where the model, its caches and the encoded images lie. Tiles stay on the host until they are encoded.
        dtype: of the weights and of all that is cached.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", dtype: Dtype = "float32") -> None:
        checkpoint = find_checkpoint(str(folder), None)
        self.processor = load_processor(checkpoint)
        # Where torchvision is installed, transformers resizes with it, and its pixels are not quite Pillow's.
        self.processor.image_processor = MllamaImageProcessorPil.from_pretrained(folder)
        self.model = load_model(checkpoint, dtype, [torch.device(device)])
        self.tiler = Tiler(self.processor)
        self.tokens = cache(Prompter(self.processor).tokens)
        self._tiles: dict[str, Tiles] = {}
        self._encoded: dict[tuple[TowerTiles, TowerPolicy | None], ImageCache] = {}

    def engine(
        self,
        policy: Policy,
        tower_tiles: TowerTiles = "pooled",
        kept_sets: KeptSets = "image",
        tower_policy: TowerPolicy | None = None,
    ) -> Engine:
        """An engine that has what earlier ones of the same tower encoded; only one of these may run at once."""
        decoding = Decoding(max_new_tokens=MAX_NEW_TOKENS)
        engine = Engine(self.model, self.processor, policy, "meta", decoding, LIMITS, tower_tiles, kept_sets, tower_policy)
        engine.batch.images = self._encoded.setdefault((tower_tiles, tower_policy), engine.batch.images)
        return engine

    def answer(self, engine: Engine, rows: Iterable[Row]) -> Iterator[Answered]:
        """The rows in order, each as soon as it is answered. All of them wait in the engine from the start, those about one
        image together."""
        asked = [(row, self._prompt(row)) for row in rows]
        prompts = [prompt for _, prompt in asked]
        futures: dict[int, Future[Completion]] = {}
        for group in engine.groups([prompt.keys for prompt in prompts], [len(prompt.tokens) for prompt in prompts]):
            futures.update(zip(group, engine.submit_together([prompts[place] for place in group]), strict=True))
        for place, (row, prompt) in enumerate(asked):
            while not futures[place].done():
                engine.batch.step()
            said = engine.answer(len(prompt.tokens), futures[place].result())
            yield Answered(row, said, len(prompt.images[0].pixels))

    def encode(self, engine: Engine, rows: Iterable[Row]) -> None:
        """Sends each image of ``rows`` that this Answerer has not encoded yet through the tower, by answering one row about
        every image; then ``engine`` takes no time for images, whichever policy comes first."""
        for _ in self.answer(engine, {row.path: row for row in rows}.values()):
            pass

    def _prompt(self, row: Row) -> Prompt:
        key = digest(row.image)
        if key not in self._tiles:
            self._tiles[key] = self.tiler(decode(row.image))
        return Prompt(row.id, self.tokens(row.question, 1), [self._tiles[key]], [key])
