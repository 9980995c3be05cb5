"""A tenth of the features, merged; and what merging takes beside the tower that gave them."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

from benchmarks.ours import Ours
from benchmarks.timing import synchronise
from benchmarks.workloads import Workload
from trimming import Clusters, KeepAll
from trimming.clustering import Clustering
from trimming.engine import Image
from trimming.engine.images import encoded_images

TENTH = 0.1
TO_A_TENTH = Clusters(keep=TENTH)
ALIKE = Clustering(likeness=0.8)
"""The dearer way to cluster, which leaves an eighth of a random model's features."""
TOGETHER = 8
"""Images of one tile count that are encoded at once."""


def measure_clustering(ours: Ours, load: Workload, turns: int) -> list[float]:
    """Seconds of clustering and of the means, over the tower's for the same images: a ratio a turn, all images in each."""
    tower = ours.engine(KeepAll()).tower
    by_tiles: defaultdict[int, list[Image]] = defaultdict(list)
    for file in load.images:
        image = ours.image(file)
        by_tiles[len(image.pixels)].append(image)
    batches = [
        (tiles, images[first : first + TOGETHER])
        for tiles, images in by_tiles.items()
        for first in range(0, len(images), TOGETHER)
    ]
    ratios = []
    for _ in range(turns):
        encoding = merging = 0.0
        for tiles, images in batches:
            began = time.perf_counter()
            with torch.inference_mode():
                found = tower.encode(images)
                synchronise(found.features.device)
                encoded = time.perf_counter()
                encoded_images(tiles, found, ALIKE)
                synchronise(found.features.device)
            merging += time.perf_counter() - encoded
            encoding += encoded - began
        ratios.append(merging / encoding)
    return ratios
