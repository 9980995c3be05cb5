"""The vision tower and the projector: images a second by tile count, exact and with fewer rows, beside the roofline."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.gpu.attention import compare_backends
from benchmarks.gpu.bench import Bench, Result, SectionError
from benchmarks.gpu.profile import longest_kernels
from benchmarks.gpu.roofline import each_seconds, measured
from pipeline.images import Normaliser, Tiler
from trimming.engine import Image
from trimming.engine.layers import computing_on
from trimming.tower import Alike, Tower, TowerPolicy, TowerTiles

TILE_COUNTS = (1, 2, 4)
WAYS: dict[str, tuple[TowerTiles, TowerPolicy | None]] = {
    "pooled": ("pooled", None),
    "all": ("all", None),
    "real": ("real", None),
    "alike 0.5": ("pooled", Alike(0.5)),
    # What it costs that a merged row counts by its size.
    "alike 0.5, unweighted": ("pooled", Alike(0.5, weighted=False)),
}
PROFILE_SECONDS = 8.0
"""That a profile, or the comparison of backends, is taken to need."""


def measure_tower(bench: Bench, out: Result) -> None:
    """Fills ``out["tiles"]`` by tile count and by ``WAYS``, ``out["sending_seconds"]``, ``out["profile"]`` and
    ``out["attention"]``. All tiles lie on the device already, but for those that are sent."""
    normalise = Normaliser(bench.processor, bench.device, bench.model.dtype)
    count = bench.amounts.tower_images
    out |= {"images": count, "tiles": {}}
    for tiles in TILE_COUNTS:
        images = random_images(bench, tiles, count)
        out["tiles"][str(tiles)] = by_way = {}
        for name, (tower_tiles, policy) in WAYS.items():
            if tower_tiles == "real" and tiles == max(TILE_COUNTS):
                # Nothing is left out there.
                continue
            bench.release()
            by_way[name] = _measure(bench, Tower(bench.model, normalise, tower_tiles, policy), images)
            bench.say(f"tower: {tiles} tiles, {name}: {by_way[name]['images_per_second']:.1f} images/s")
            bench.save()
    # The last images', which have the most tiles, from pageable memory as in a job.
    on_host = torch.cat([image.pixels for image in images]).cpu()
    sent = each_seconds(bench.device, lambda: on_host.to(bench.device, copy=True), bench.amounts.tower_runs)
    out["sending_seconds"] = statistics.median(sent)
    if bench.has(PROFILE_SECONDS):
        tower = Tower(bench.model, normalise)
        with torch.inference_mode(), computing_on(bench.device):
            out["profile"] = longest_kernels(bench.device, lambda: tower.encode(images))
        bench.save()
    if bench.has(PROFILE_SECONDS):
        out["attention"] = compare_backends(bench)


def random_images(bench: Bench, tiles: int, count: int) -> list[Image]:
    """Images of noise on the device, each of so many tiles."""
    grids = Tiler(bench.processor).grids
    ratio = next(i for i, (rows, columns) in enumerate(grids, 1) if rows * columns == tiles)
    side = bench.model.config.vision_config.image_size
    generator = torch.Generator(bench.device).manual_seed(bench.amounts.seed)
    noise = partial(torch.randint, 0, 256, dtype=torch.uint8, device=bench.device, generator=generator)
    return [Image(f"{tiles}/{i}", noise(size=(tiles, 3, side, side)), ratio) for i in range(count)]


def _measure(bench: Bench, tower: Tower, images: list[Image]) -> Result:
    with torch.inference_mode(), computing_on(bench.device):
        # Warms up as well: libraries pick their kernels at the first call.
        for _ in range(2):
            features = tower.encode(images).features
        if not features.isfinite().all():
            raise SectionError("the tower's features are not finite: the weights are no measure of anything")
        del features
        taken = each_seconds(bench.device, lambda: tower.encode(images), bench.amounts.tower_runs)
    tiles, count = len(images[0].pixels), len(images)
    costs = bench.costs
    calls = [costs.tower(tiles, count, tower.tower_tiles, tower.policy), costs.projector(tiles, count, tower.policy)]
    found = measured(calls, taken, bench.rates)
    return found | {"images_per_second": count / found["seconds"], "peak_bytes": bench.peak_bytes()}
