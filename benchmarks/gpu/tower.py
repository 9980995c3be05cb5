"""The vision tower and the projector: images a second by tile count, exact and without padding tiles, beside the roofline."""

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
from trimming.tower import Tower, TowerTiles

TILE_COUNTS = (1, 2, 4)
MODES: tuple[TowerTiles, ...] = ("pooled", "all", "real")
PROFILE_SECONDS = 8.0
"""That a profile, or the comparison of backends, is taken to need."""


def measure_tower(bench: Bench, out: Result) -> None:
    """Fills ``out["tiles"]`` by tile count and by ``tower_tiles``, ``out["sending_seconds"]``, ``out["profile"]`` and
    ``out["attention"]``. All tiles lie on the device already, but for those that are sent."""
    normalise = Normaliser(bench.processor, bench.device, bench.model.dtype)
    count = bench.amounts.tower_images
    out |= {"images": count, "tiles": {}}
    for tiles in TILE_COUNTS:
        images = random_images(bench, tiles, count)
        out["tiles"][str(tiles)] = by_mode = {}
        for mode in MODES:
            if mode == "real" and tiles == max(TILE_COUNTS):
                # Nothing is left out there.
                continue
            bench.release()
            by_mode[mode] = _measure(bench, Tower(bench.model, normalise, mode), images, mode)
            bench.say(f"tower: {tiles} tiles, {mode}: {by_mode[mode]['images_per_second']:.1f} images/s")
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


def _measure(bench: Bench, tower: Tower, images: list[Image], mode: TowerTiles) -> Result:
    with torch.inference_mode(), computing_on(bench.device):
        # Warms up as well: libraries pick their kernels at the first call.
        for _ in range(2):
            features = tower.encode(images).features
        if not features.isfinite().all():
            raise SectionError("the tower's features are not finite: the weights are no measure of anything")
        del features
        taken = each_seconds(bench.device, lambda: tower.encode(images), bench.amounts.tower_runs)
    tiles, count = len(images[0].pixels), len(images)
    found = measured([bench.costs.tower(tiles, count, mode), bench.costs.projector(tiles, count)], taken, bench.rates)
    return found | {"images_per_second": count / found["seconds"], "peak_bytes": bench.peak_bytes()}
