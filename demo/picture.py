"""Draw which visual features stay: ``python -m demo.picture --output demo/results/kept-features.png``.

One row a held-out scene (by default the first of each tile count): the scene as it is, then with the patches veiled that
TrimmedLlama drops at each K, then with what Clusters merges in one colour, and what merges inside the tower; the model's
caption under each. ``--broken N`` draws the first scenes whose caption is exact with all features and not with what the last
likeness leaves.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from demo import MODELS, scenes, shards
from demo.scenes import FLAT, STYLES, Style
from jobs.comparison.overlay import Geometry

if TYPE_CHECKING:
    from demo.answerer import Answered, Answerer
    from trimming import Policy
    from trimming.tower import TowerPolicy

PANEL, GAP, LINE = 330, 18, 19
INK, PAPER, FAULT = (40, 40, 40), (255, 255, 255), (190, 30, 30)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=tuple(STYLES), default=FLAT.name, help="of the scenes (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="default: the demo model of that style")
    parser.add_argument("--output", type=Path, required=True, help="PNG or JPEG file to write")
    parser.add_argument("--scenes", type=int, nargs="+", metavar="I", help="held-out scenes by index")
    parser.add_argument("--broken", type=int, metavar="N", help="in their place: scenes whose caption merging breaks")
    parser.add_argument("--k-ratio", type=float, nargs="*", metavar="K", default=[0.25, 0.05])
    parser.add_argument("--likeness", type=float, nargs="+", metavar="L", default=[0.9])
    parser.add_argument("--tower-keep", type=float, nargs="*", metavar="T", default=[0.5])
    options = parser.parse_args(arguments)
    for name in ("k-ratio", "likeness", "tower-keep"):
        given = getattr(options, name.replace("-", "_"))
        if not all(0 < each <= 1 for each in given):
            parser.error(f"--{name} {' '.join(map(str, given))}: give numbers above 0 and at most 1")
    if options.broken is not None and options.broken < 1:
        parser.error(f"--broken {options.broken}: give 1 or more")

    from demo.answerer import Answerer
    from trimming import Clusters, KeepAll, TrimmedLlama
    from trimming.tower import Alike

    style = STYLES[options.style]
    answerer = Answerer(options.model or MODELS[style.name])
    if options.broken:
        chosen = list(islice(broken(answerer, style, options.likeness[-1]), options.broken))
        if not chosen:
            print(f"demo.picture: a likeness of {options.likeness[-1]:g} breaks no caption", file=sys.stderr)
            return 1
    else:
        chosen = options.scenes or first_of_each_tile_count(answerer, style)
    ways = [
        *(Way(f"K = {k:g}", TrimmedLlama(k_ratio=k)) for k in options.k_ratio),
        *(Way(f"merged at likeness {likeness:g}", Clusters(likeness=likeness)) for likeness in options.likeness),
        *(Way(f"merged in the tower, {keep:g} of it left", KeepAll(), Alike(keep)) for keep in options.tower_keep),
    ]
    rows = [strip(answerer, style, index, ways) for index in chosen]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    stacked(rows).save(options.output, optimize=True)
    print(options.output)
    return 0


def first_of_each_tile_count(answerer: Answerer, style: Style) -> list[int]:
    found: dict[int, int] = {}
    for index in range(1_000):
        tiles = answerer.tiler.tile_count(*scenes.draw(scenes.scene("test", index, style=style)).size)
        found.setdefault(tiles, index)
        if len(found) == 4:
            break
    return [found[count] for count in sorted(found)]


def broken(answerer: Answerer, style: Style, likeness: float) -> Iterator[int]:
    """Of the first thousand scenes, those whose caption is exact with all features and not with those merged."""
    from trimming import Clusters, KeepAll

    full, merged = answerer.engine(KeepAll()), answerer.engine(Clusters(likeness=likeness))
    for index, rows in enumerate(shards.scene_rows("test", 1_000, ("caption",), style)):
        (before,), (after,) = answerer.answer(full, rows), answerer.answer(merged, rows)
        if before.right and not after.right:
            yield index


@dataclass(frozen=True, slots=True)
class Way:
    """A way to keep less."""

    title: str
    policy: Policy
    tower: TowerPolicy | None = None


def strip(answerer: Answerer, style: Style, index: int, ways: Iterable[Way]) -> Image.Image:
    """One scene's row: its panels side by side."""
    from trimming import KeepAll

    geometry = Geometry.of(answerer.model.config.to_dict())
    (row,) = next(islice(shards.scene_rows("test", index + 1, ("caption",), style), index, None))
    image = Image.open(io.BytesIO(row.image)).convert("RGB")
    grid = answerer.tiler(image).grid
    (full,) = answerer.answer(answerer.engine(KeepAll()), [row])
    tiles = grid[0] * grid[1]
    title = f"{image.width} by {image.height} pixels, {tiles} tile{'s' if tiles > 1 else ''}: {row.question}"
    panels = [panel(image, title, full)]
    for way in ways:
        (answered,) = answerer.answer(answerer.engine(way.policy, tower_policy=way.tower), [row])
        said = answered.said
        left = f"{said.kept_visual_tokens} features, {said.keep_fraction:.0%}"
        if said.merged_into is None:
            shown = geometry.veil(enlarged(image), image.size, said.kept, grid)
        else:
            shown = geometry.regions(enlarged(image), image.size, said.merged_into.tolist(), grid)
        panels.append(panel(shown, f"{way.title}: {left}", answered))
    out = Image.new("RGB", (len(panels) * (PANEL + GAP) + GAP, max(p.height for p in panels)), PAPER)
    for place, each in enumerate(panels):
        out.paste(each, (GAP + place * (PANEL + GAP), 0))
    return out


def enlarged(image: Image.Image) -> Image.Image:
    """Four times as large: lines between patches are thin there."""
    return image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)


def panel(image: Image.Image, title: str, answered: Answered) -> Image.Image:
    """The picture in a frame, its title above, the caption below: in red where it is not exact."""
    ratio = min(PANEL / image.width, PANEL * 0.75 / image.height)
    shown = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)
    lines = textwrap.wrap(answered.said.text or "(nothing)", width=44, max_lines=4)
    out = Image.new("RGB", (PANEL, 2 * LINE + shown.height + 8 + LINE * len(lines)), PAPER)
    canvas = ImageDraw.Draw(out)
    font = ImageFont.load_default(size=14)
    for number, line in enumerate(textwrap.wrap(title, width=48)[:2]):
        canvas.text((0, number * (LINE - 2)), line, fill=INK, font=font)
    out.paste(shown, (0, 2 * LINE))
    canvas.rectangle((0, 2 * LINE, shown.width - 1, 2 * LINE + shown.height - 1), outline=(190, 190, 190))
    for number, line in enumerate(lines):
        canvas.text((0, 2 * LINE + shown.height + 6 + number * LINE), line, fill=INK if answered.right else FAULT, font=font)
    return out


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (max(r.width for r in rows), sum(r.height + GAP for r in rows) + GAP), PAPER)
    top = GAP
    for each in rows:
        out.paste(each, (0, top))
        top += each.height + GAP
    return out


if __name__ == "__main__":
    sys.exit(main())
