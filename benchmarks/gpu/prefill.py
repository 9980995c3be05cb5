"""Prefills of captions beside the roofline, where their time goes, and what choosing features by distance takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.gpu.bench import Bench, Result
from benchmarks.gpu.profile import longest_kernels
from benchmarks.gpu.roofline import each_seconds, measured
from benchmarks.gpu.tower import PROFILE_SECONDS, random_images
from benchmarks.half import HALF
from benchmarks.ours import Ours
from pipeline.images import Normaliser
from trimming import Grid, KeepAll, Policy
from trimming.costs import Look
from trimming.engine import Engine, Request
from trimming.engine.images import ImageCache
from trimming.engine.layers import computing_on
from trimming.engine.sequence import Encoded, Sequence_
from trimming.selection import farthest_points, unit_rows
from trimming.tower import Tower

TILES = 2
"""As most photographs have."""
POLICIES: dict[str, Policy] = {"full": KeepAll(), "half": Grid(keep=HALF)}
"""An even grid keeps exactly half, and choosing it costs nothing."""
BATCH_SECONDS = 3.0
CHOSEN = 0.1
"""Share of an image's features that ``farthest_points`` is timed with."""


@torch.inference_mode()
def measure_prefill(bench: Bench, out: Result) -> None:
    """Fills ``out["policies"]`` by policy and batch size, ``out["profile"]`` of the largest one with all features, and
    ``out["farthest_points"]``."""
    amounts, tokens = bench.amounts, TILES * bench.costs.tokens
    out |= {"tiles": TILES, "prompt": amounts.caption_prompt, "policies": {}}
    with computing_on(bench.device):
        tower = Tower(bench.model, Normaliser(bench.processor, bench.device, bench.model.dtype))
        most = max(amounts.prefills)
        images = [image for _ in range(-(-most // 8)) for image in random_images(bench, TILES, min(most, 8))][:most]
        features = [tower.encode([image]).features[0].clone() for image in images]
        kv_bytes = 2 * most * bench.costs.kv_bytes(amounts.caption_prompt + 64, tokens)
        for name, policy in POLICIES.items():
            engine = Ours(bench.model, bench.processor, most, kv_bytes).engine(policy, ImageCache(0))
            part: Result = {"batches": {}}
            out["policies"][name] = part
            for batch in amounts.prefills:
                if not bench.has(BATCH_SECONDS):
                    bench.say(f"prefill: {name}, batch {batch}: no time")
                    break
                part["batches"][str(batch)] = one = Prefills(bench, engine, features[:batch]).measure()
                bench.say(f"prefill: {name}, batch {batch}: {one['seconds'] * 1e3:.1f} ms")
                bench.save()
            if name == "full" and bench.has(PROFILE_SECONDS):
                out["profile"] = longest_kernels(bench.device, Prefills(bench, engine, features))
                bench.save()
            # Its memory is the next one's.
            del engine
        if bench.has(PROFILE_SECONDS):
            out["farthest_points"] = _farthest(bench, features[0])


class Prefills:
    """The same prompts again and again, each about an image of its own whose first keys and values are projected anew."""

    def __init__(self, bench: Bench, engine: Engine, features: Sequence[torch.Tensor]) -> None:
        self.bench, self.engine = bench, engine
        word = len(bench.processor.tokenizer) // 2
        tokens = [bench.model.config.image_token_index, *[word] * (bench.amounts.caption_prompt - 1)]
        image = random_images(bench, TILES, 1)[0]
        for number in range(len(features)):
            own = replace(image, key=str(number))
            engine.submit(Request(id=str(number), tokens=tokens, images=[own], max_new_tokens=1))
        self.batch: list[Sequence_] = list(engine.waiting)
        engine.waiting.clear()
        self.features = features

    def __call__(self) -> None:
        engine, batch = self.engine, self.batch
        for sequence, features in zip(batch, self.features, strict=True):
            sequence.group.encoded = [Encoded(TILES, features)]
        if not engine._reserve(batch):
            raise RuntimeError(f"{len(batch)} sequences do not fit the memory that was sized for them")
        engine.prefill(batch)
        engine._unreserve(batch)

    def measure(self) -> Result:
        bench, costs, count = self.bench, self.bench.costs, len(self.batch)
        bench.release()
        self()
        taken = each_seconds(bench.device, self, bench.amounts.prefill_runs)
        prompt = bench.amounts.caption_prompt
        (kept,) = {s.trim.kept_visual_tokens for s in self.batch if s.trim}
        # A grid is decided before the language model runs: the first cross-attention layer too projects what is kept alone.
        language = costs.prefill([prompt] * count, [Look(prompt, kept, kept)] * count)
        return measured([costs.cross_kv(count * kept, count * kept), language], taken, bench.rates) | {
            "kept": kept,
            "peak_bytes": bench.peak_bytes(),
        }


def _farthest(bench: Bench, features: torch.Tensor) -> Result:
    """Seconds and launches of the greedy choice of one image's features, as ``spread`` and DivPrune make it."""
    count = max(2, round(CHOSEN * len(features)))

    def choose() -> torch.Tensor:
        return farthest_points(unit_rows(features), count, 0)

    bench.release()
    choose()
    (seconds,) = each_seconds(bench.device, choose, 1)
    kernels = longest_kernels(bench.device, choose)["kernels"]
    bench.say(f"prefill: choosing {count} of {len(features)} features by distance: {seconds * 1e3:.1f} ms, {kernels} launches")
    return {"features": len(features), "chosen": count, "seconds": seconds, "launches": kernels}
