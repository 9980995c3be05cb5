"""The engine's side: the same files and prompts, through the pipeline's own image and prompt code."""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.timing import Pass
from benchmarks.workloads import Workload
from pipeline.images import Normaliser, Tiler, digest
from pipeline.pictures import decode
from pipeline.prompts import Prompter
from trimming import KeepAll, Policy
from trimming.engine import Completion, Engine, Image, KeptSets, Request
from trimming.engine.images import ImageCache
from trimming.tower import TowerPolicy, TowerTiles

IMAGE_CACHE_BYTES = 1 << 30


class Ours:
    """Makes engines for one model, and passes with them.

    Args:
        max_sequences: rows that decode at once, at most.
        kv_bytes: room for their caches.
    """

    def __init__(
        self, model: MllamaForConditionalGeneration, processor: MllamaProcessor, max_sequences: int, kv_bytes: int
    ) -> None:
        self.model, self.processor, self.max_sequences, self.kv_bytes = model, processor, max_sequences, kv_bytes
        self.tiler, self.prompter = Tiler(processor), Prompter(processor)
        self.normalise = Normaliser(processor, model.device, model.dtype)

    def __call__(
        self,
        workload: Workload,
        policy: Policy | None = None,
        *,
        kept_sets: KeptSets = "image",
        batch_size: int | None = None,
        reuse: bool = True,
        tower_tiles: TowerTiles = "all",
        tower_policy: TowerPolicy | None = None,
    ) -> Pass:
        """One pass with an engine of its own, whose making is not timed, as the model's is not.

        ``batch_size`` stands for static batches: each goes on for all its rows until the longest is done, as the peer's do, and
        only then comes the next; None hands all rows over at once. Without ``reuse`` every row has an image of its own, decoded
        and encoded anew. The default policy keeps everything, and all rows go through the tower, those of padding tiles too.
        """
        images = ImageCache(IMAGE_CACHE_BYTES if reuse else 0)
        engine = self.engine(policy or KeepAll(), images, kept_sets, tower_tiles, tower_policy, batch_size)
        preparing = generating = 0.0
        completions: list[Completion] = []
        tokens: list[list[int]] = []
        known: dict[int, Image] = {}
        began = time.perf_counter()
        size = batch_size or len(workload.rows)
        for start in range(0, len(workload.rows), size):
            now = time.perf_counter()
            rows = workload.rows[start : start + size]
            longest = max(row.length for row in rows) if batch_size else None
            requests = self.requests(workload, range(start, start + len(rows)), known if reuse else None, longest)
            preparing += time.perf_counter() - now
            now = time.perf_counter()
            answered = engine.generate(requests)
            generating += time.perf_counter() - now
            said = [one.tokens[: row.length] for one, row in zip(answered, rows, strict=True)]
            self.processor.batch_decode(said, skip_special_tokens=True)
            completions += answered
            tokens += said
        seconds = time.perf_counter() - began
        tower = engine.seconds["tower"]
        return Pass(
            seconds=seconds,
            preparing=preparing,
            tower=tower,
            generation=generating - tower,
            tokens=tokens,
            measured=measured(engine, completions),
        )

    def engine(
        self,
        policy: Policy,
        images: ImageCache | None = None,
        kept_sets: KeptSets = "image",
        tower_tiles: TowerTiles = "all",
        tower_policy: TowerPolicy | None = None,
        sequences: int | None = None,
    ) -> Engine:
        """No token ends a row: its length does. ``images`` are those encoded before, by default none; ``sequences`` is how many
        decode at once where it is not ``max_sequences``."""
        engine = Engine(
            self.model,
            policy,
            normalise=self.normalise,
            eos=(),
            kv_bytes=self.kv_bytes,
            max_sequences=sequences or self.max_sequences,
            tower_tiles=tower_tiles,
            tower_policy=tower_policy,
            kept_sets=kept_sets,
        )
        # An empty cache is false.
        engine.images = ImageCache(IMAGE_CACHE_BYTES) if images is None else images
        return engine

    def requests(
        self, workload: Workload, rows: Sequence[int], known: dict[int, Image] | None, length: int | None = None
    ) -> list[Request]:
        """Requests of the rows at these places, for ``length`` tokens each or their own.

        ``known`` holds the images cut before, by their place; None shares none.
        """
        requests = []
        for at in rows:
            row = workload.rows[at]
            if known is None:
                image = self.image(workload.images[row.image], f"{at}/")
            elif row.image in known:
                image = known[row.image]
            else:
                image = known[row.image] = self.image(workload.images[row.image])
            tokens = self.prompter.tokens(row.prompt, images=1)
            requests.append(Request(id=str(at), tokens=tokens, images=[image], max_new_tokens=length or row.length))
        return requests

    def image(self, file: bytes, prefix: str = "") -> Image:
        """A file's tiles, under its digest."""
        tiles = self.tiler(decode(file))
        return Image(f"{prefix}{digest(file)}", tiles.pixels, tiles.ratio_id)


def measured(engine: Engine, completions: Sequence[Completion]) -> dict[str, float]:
    fractions = [one.trim.keep_fraction or 0.0 for one in completions]
    counted = engine.statistics
    return {
        "keep_fraction": sum(fractions) / len(fractions),
        "prefill_seconds": engine.seconds["prefill"],
        "decode_seconds": engine.seconds["decode"],
        "decode_tokens": counted.decode_tokens,
        "decode_steps": counted.decode_steps,
        "images_encoded": counted.images_encoded,
        "peak_sequences": counted.peak_sequences,
        "peak_cross_kv_bytes": counted.peak_cross_kv_bytes,
        "cross_kv_byte_seconds": counted.cross_kv_byte_seconds,
        "cross_kv_bytes_read": counted.cross_kv_bytes_read,
    }
