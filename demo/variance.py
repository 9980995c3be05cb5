"""How many clusters explain the features of real photographs: ``python -m demo.variance --output demo/results``.

The photographs that ride in packages' wheels, cut into four tiles each, go through both demo models' towers, and as many
held-out scenes of the model's own beside them. For each tile by itself: the fewest clusters whose means explain 95 and 99 % of
the variance of its features about their mean, of k-means, which looks for just that, and of ``Clusters``, which looks for alike
directions; and what ``Clusters`` makes of the whole image at a likeness. Writes ``variance.json`` and ``variance.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo import MODELS, photographs, scenes
from demo.scenes import STYLES, Style
from demo.table import LIKENESSES, conditions, percent, row, sha256, write

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from demo.answerer import Answerer

EXPLAINED = (0.95, 0.99)
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of variance.json and variance.md")
    most = len(photographs.NAMES["test"])
    parser.add_argument(
        "--images", type=int, metavar="N", default=most, help="of each kind (default: %(default)s, all there are)"
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.images <= most:
        parser.error(f"--images {options.images}: there are {most} photographs")

    from demo.answerer import Answerer

    report: Result = {"models": {}, "conditions": conditions()}
    for style, folder in MODELS.items():
        answerer, name = Answerer(folder), f"demo/{folder.name}"
        kinds = {"photographs": whole_photographs(), "scenes": four_tile_scenes(answerer, STYLES[style])}
        found = {kind: [measured(answerer, *image) for image in say(islice(images, options.images), f"{name}, {kind}")]
                 for kind, images in kinds.items()}  # fmt: skip
        report["models"][name] = {"model_sha256": sha256(folder / "model.safetensors"), **found}
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "variance.json", json.dumps(report, indent=1) + "\n")
    write(options.output / "variance.md", markdown(report))
    print(markdown(report))
    return 0


def say(images: Iterable[tuple[str, Image.Image]], what: str) -> Iterator[tuple[str, Image.Image]]:
    for done, image in enumerate(images, 1):
        print(f"\r{what}: {done}", end="", file=sys.stderr, flush=True)
        yield image
    print(file=sys.stderr)


# ---- images -----------------------------------------------------------------------------------------------------------------


def whole_photographs() -> Iterator[tuple[str, Image.Image]]:
    """The middle square of each photograph: two by two tiles, and as sharp as the tiles are."""
    from PIL import Image, ImageOps

    for name in photographs.NAMES["test"]:
        side = 2 * scenes.TILE
        yield Path(name).stem, ImageOps.fit(photographs.photograph(name), (side, side), Image.Resampling.LANCZOS)


def four_tile_scenes(answerer: Answerer, style: Style) -> Iterator[tuple[str, Image.Image]]:
    """Held-out scenes of four tiles."""
    for index in range(1_000):
        image = scenes.draw(scenes.scene("test", index, style=style))
        if answerer.tiler.tile_count(*image.size) == 4:
            yield f"{style.name} {index}", image


# ---- what is measured -------------------------------------------------------------------------------------------------------


def measured(answerer: Answerer, name: str, image: Image.Image) -> Result:
    """Clusters by tile and share of the variance, of both kinds, and by likeness for the whole image."""
    from trimming.clustering import Clustering

    tiles = features(answerer, image)
    by_tile = [
        {
            "k-means": [fewest(len(tile), lambda k, tile=tile: k_means(tile, k), goal) for goal in EXPLAINED],  # type: ignore[misc]
            "clusters": fewest_of_clusters(tile),
        }
        for tile in tiles
    ]
    whole = tiles.flatten(0, 1)
    merged = {}
    for likeness in LIKENESSES:
        cluster = Clustering(likeness=likeness)(whole[None])[0]
        merged[str(likeness)] = {"clusters": int(cluster.max()) + 1, "explained": explained(whole, cluster)}
    return {"image": name, "features_a_tile": tiles.shape[1], "tiles": by_tile, "whole": merged}


def features(answerer: Answerer, image: Image.Image) -> Tensor:
    """(tiles, n, w): as the tower and the projector give them, class tokens first."""
    import torch

    from pipeline.images import Normaliser
    from trimming.engine import Image as Encodable
    from trimming.tower import Tower

    cut = answerer.tiler(image)
    model = answerer.model
    tower = Tower(model, Normaliser(answerer.processor, model.device, model.dtype), "all")
    with torch.inference_mode():
        found = tower.encode([Encodable("", cut.pixels, cut.ratio_id)]).features
    return found[0].unflatten(0, (len(cut.pixels), -1)).clone()


def fewest(most: int, explains: Callable[[int], float], goal: float) -> int:
    """The fewest clusters, of 1 to ``most``, that explain ``goal``, as if more always explained more."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if explains(middle) >= goal else (middle + 1, high)
    return low


def fewest_of_clusters(tile: Tensor) -> list[int]:
    from trimming.clustering import Clustering

    count = len(tile)
    shares = [explained(tile, Clustering(keep=k / count)(tile[None])[0]) for k in range(1, count + 1)]
    # From which number on all explain that much: density peaks are no nested partitions.
    return [1 + max((k for k, share in enumerate(shares, 1) if share < goal), default=0) for goal in EXPLAINED]


def k_means(tile: Tensor, clusters: int) -> float:
    """The share of the variance that ``clusters`` of k-means explain."""
    from sklearn.cluster import KMeans

    fitted = KMeans(clusters, n_init=1, random_state=0).fit(tile.numpy())
    return 1 - float(fitted.inertia_) / float((tile - tile.mean(0)).square().sum())


def explained(found: Tensor, cluster: Tensor) -> float:
    """Of ``found`` (n, w), the share of the variance about their mean that clusters' means explain."""
    from trimming.clustering import merge_clusters

    (merged,) = merge_clusters(found[None], cluster[None])
    return 1 - float((found - merged.features[cluster]).square().sum() / (found - found.mean(0)).square().sum())


# ---- the page ---------------------------------------------------------------------------------------------------------------


def markdown(report: Result) -> str:
    lines = [
        "The fewest clusters of a tile's features whose means explain 95 and 99 % of their variance about their mean: median "
        "over tiles (least to most), and as a share of the tile's features. *k-means* looks for just that; *clusters* are "
        "those of `--policy clusters`, which looks for alike directions.",
        "",
    ]
    heads = [
        "model",
        "images",
        "features a tile",
        *(f"{kind}, {goal:.0%}" for kind in ("k-means", "clusters") for goal in EXPLAINED),
    ]
    lines += [row(heads), row(["---", "---", *["---:"] * (len(heads) - 2)])]
    for name, model in report["models"].items():
        for kind in ("photographs", "scenes"):
            count = model[kind][0]["features_a_tile"]
            cells = [spread([tile[how][place] for image in model[kind] for tile in image["tiles"]], count)
                     for how in ("k-means", "clusters") for place in range(len(EXPLAINED))]  # fmt: skip
            lines.append(row([name, f"{len(model[kind])} {kind}", str(count), *cells]))
    lines += [
        "",
        "What `--policy clusters` makes of whole images of four tiles: features left, and variance explained, medians.",
        "",
    ]
    heads = ["model", "images", *(f"likeness {likeness}" for likeness in LIKENESSES)]
    lines += [row(heads), row(["---", "---", *["---:"] * len(LIKENESSES)])]
    for name, model in report["models"].items():
        for kind in ("photographs", "scenes"):
            cells = []
            for likeness in map(str, LIKENESSES):
                left = statistics.median(each["whole"][likeness]["clusters"] for each in model[kind])
                share = left / (4 * model[kind][0]["features_a_tile"])
                variance = statistics.median(each["whole"][likeness]["explained"] for each in model[kind])
                cells.append(f"{percent(share)} % · {percent(variance)} %")
            lines.append(row([name, kind, *cells]))
    for name, model in report["models"].items():
        lines += ["", f"By photograph, {name}: clusters of each tile, k-means, 95 · 99 %; then what is left of the image.", ""]
        lines += [row(["photograph", "tiles, k-means", *(f"likeness {likeness}" for likeness in LIKENESSES)])]
        lines += [row(["---", "---", *["---:"] * len(LIKENESSES)])]
        for each in model["photographs"]:
            tiles = ", ".join(f"{tile['k-means'][0]} · {tile['k-means'][1]}" for tile in each["tiles"])
            left = [each["whole"][str(likeness)] for likeness in LIKENESSES]
            share = 4 * each["features_a_tile"]
            lines.append(row([each["image"], tiles, *(f"{percent(one['clusters'] / share)} %" for one in left)]))
    listed = "; ".join(f"{name} {value}" for name, value in report["conditions"].items())
    models = ", ".join(f"{name} {model['model_sha256'][:12]}" for name, model in report["models"].items())
    return "\n".join([*lines, "", f"Conditions: {listed}; {models}."]) + "\n"


def spread(values: Sequence[int], of: int) -> str:
    middle = statistics.median(values)
    return f"{middle:g} ({min(values)} to {max(values)}), {percent(middle / of)} %"


if __name__ == "__main__":
    sys.exit(main())
