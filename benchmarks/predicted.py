"""What ``trimming.costs`` says of the workloads: the tower's share, and what fewer features could give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import add

from benchmarks.timing import Pass
from benchmarks.workloads import CAPTION_PROMPT, Workload
from trimming.costs import Cost, Costs, Look, Stages
from trimming.tower import TowerTiles


def captioning_stages(load: Workload, costs: Costs, tower_tiles: TowerTiles) -> Stages:
    """Costs of all captions, each by itself."""
    rows = [(load.tiles[row.image], row.length) for row in load.rows]
    each = (costs.batch(tiles=tiles, prompt=CAPTION_PROMPT, output=length, tower_tiles=tower_tiles) for tiles, length in rows)
    return reduce(add, each)


def language_costs(load: Workload, costs: Costs, keep: float, merged: bool = False) -> dict[str, Cost]:
    """``prefill``, with keys and values of the images, and ``decode``: all rows at once, rows about one image sharing what it
    keeps. As Trimmed-Llama has it, the first cross-attention layer's prefill sees everything; where features are ``merged``
    beforehand, it sees what is left."""
    visual = [tiles * costs.tokens for tiles in load.tiles]
    kept = [max(1, round(keep * tokens)) for tokens in visual]
    visual = kept if merged else visual
    # The image's token and the begin of text.
    rows = [(row.image, len(row.prompt.split()) + 2, row.length) for row in load.rows]
    prefill = costs.cross_kv(sum(visual), sum(kept))
    prefill += costs.prefill(
        [prompt for _, prompt, _ in rows], [Look(prompt, visual[image], kept[image]) for image, prompt, _ in rows]
    )
    decode = Cost()
    for said in range(1, max(length for *_, length in rows)):
        running = [(image, prompt) for image, prompt, length in rows if length > said]
        asked = Counter(image for image, _ in running)
        looks = [Look(count, kept[image], kept[image]) for image, count in asked.items()]
        decode += costs.decode([prompt + said for _, prompt in running], looks)
    return {"prefill": prefill, "decode": decode}


def fewer_over_all(
    load: Workload, costs: Costs, full: Sequence[Pass], keep: float, merged: bool = False
) -> dict[str, list[float]]:
    """Ratios of speed, a share of the features to all: ``end_to_end`` and ``generation``, each from stages that are bound by
    operations to stages that are bound by whichever shrinks more, operations or bytes: more than this no roofline allows.

    Stages take what they took in the ``full`` passes, medians; fewer features change prefill and decoding alone.
    """
    middle = sorted(full, key=lambda one: one.seconds)[len(full) // 2]
    every, fewer = language_costs(load, costs, 1.0), language_costs(load, costs, keep, merged)
    saved = [0.0, 0.0]
    for stage, cost in every.items():
        operations, moved = fewer[stage].operations / cost.operations, fewer[stage].bytes / cost.bytes
        for place, left in enumerate((operations, min(operations, moved))):
            saved[place] += middle.measured[f"{stage}_seconds"] * (1 - left)
    wholes = {"end_to_end": middle.seconds, "generation": middle.generation}
    return {name: [seconds / (seconds - one) for one in saved] for name, seconds in wholes.items()}
