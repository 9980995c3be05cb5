"""Drawn scenes with questions and a caption for each, in two styles: the demo's harder data sets.

``FLAT`` scenes hold 2–6 objects on plain paper, ``PHOTO`` scenes 3–8 smaller ones over crops of real photographs, marked with
letters and two-digit numbers. A scene is decided by its style, split and index alone (``scene("test", 17)`` is the same picture
everywhere), so the splits need no files. Held-out scenes each hold at least one shape–colour–mark combination that no training
scene holds, and lie on photographs that no training scene lies on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from demo import photographs
from demo.photographs import Crop

TILE = 112
"""Side of the demo model's tile in pixels; canvases are drawn near whole multiples of it."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
}
KINDS = ("color", "shape", "count", "position", "letter", "caption")
CAPTION_PROMPT = "list the objects from left to right."

# (columns, rows) of tiles; portrait and landscape of each count.
LAYOUTS = ((1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (2, 2))


@dataclass(frozen=True, slots=True)
class Style:
    """How scenes of one set are drawn.

    ``marks``: what may be written on an object, by alphabet, each as likely; ``most``: objects by tile count; ``sizes``: of an
    object, in pixels; ``patch``: side of the patches of the model that reads them, in pixels."""

    name: str
    marks: tuple[tuple[str, ...], ...]
    fewest: int
    most: dict[int, int]
    sizes: tuple[float, float]
    patch: int
    photographs: bool

    def __hash__(self) -> int:
        return hash(self.name)


FLAT = Style("scenes", (("A", "C", "E", "H", "K", "T", "X", "3", "4", "7"),), 2, {1: 3, 2: 5, 3: 6, 4: 6}, (28, 46), 14, False)
_NUMBERS = tuple(str(number) for number in range(10, 100))
PHOTO = Style(
    "photo-scenes",
    (("A", "C", "E", "H", "K", "L", "P", "T", "U", "X"), _NUMBERS),
    3,
    {1: 4, 2: 6, 3: 8, 4: 8},
    (22, 34),
    7,
    True,
)
STYLES = {style.name: style for style in (FLAT, PHOTO)}
# Two objects nearer than this on an axis have no order on it, in pixels.
MIN_GAP = 9


@dataclass(frozen=True, slots=True)
class Object:
    """One drawn thing: centre and size in pixels, ``glyph`` the letter or digit on it, or ''."""

    shape: str
    color: str
    glyph: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """``objects`` run from left to right; they lie on paper of one colour or on a part of a photograph."""

    width: int
    height: int
    background: tuple[int, int, int] | Crop
    objects: tuple[Object, ...]
    tints: tuple[tuple[int, int, int], ...]

    @property
    def caption(self) -> str:
        return ", ".join(f"{o.name} {o.glyph.lower()}".strip() for o in self.objects)


def held_out(shape: str, color: str, glyph: str, style: Style = FLAT) -> bool:
    """Whether the combination is kept from training; objects without a glyph never are."""
    if not glyph:
        return False
    mark = [mark for alphabet in style.marks for mark in alphabet].index(glyph)
    return (SHAPES.index(shape) + 2 * list(COLORS).index(color) + 3 * mark) % 7 == 0


def scene(split: str, index: int, drill: bool = False, style: Style = FLAT) -> Scene:
    """The ``index``-th scene of ``split`` ("train" or "test").

    A ``drill`` is for training only: one tile, and a letter or digit on every object, so that reading is learnt on cheap
    pictures.
    """
    rng = random.Random(f"{split}/{index}/{'drill' if drill else 'scene'}")
    behind = photographs.NAMES[split] if style.photographs else ()
    while True:
        drawn = _attempt(rng, style, LAYOUTS[:1] if drill else LAYOUTS, 1.0 if drill else 0.5, behind)
        if drawn is None:
            continue
        novel = any(held_out(o.shape, o.color, o.glyph, style) for o in drawn.objects)
        if novel == (split == "test") and all(question(drawn, kind, random.Random(0)) for kind in KINDS):
            return drawn


def _attempt(
    rng: random.Random, style: Style, layouts: Sequence[tuple[int, int]], marked: float, behind: Sequence[str]
) -> Scene | None:
    columns, rows = rng.choice(layouts)
    width = round(columns * TILE * rng.uniform(0.86, 1.0))
    height = round(rows * TILE * rng.uniform(0.86, 1.0))
    count = rng.randint(style.fewest, style.most[columns * rows])
    names: set[tuple[str, str]] = set()
    glyphs = [rng.sample(alphabet, count) for alphabet in style.marks]
    placed: list[Object] = []
    for i in range(count):
        for _ in range(40):
            size = rng.uniform(*style.sizes)
            margin = size / 2 + 2
            x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
            if all(abs(x - o.x) >= MIN_GAP and max(abs(x - o.x), abs(y - o.y)) > (size + o.size) / 2 + 2 for o in placed):
                break
        else:
            return None
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        if (shape, color) in names:
            return None
        names.add((shape, color))
        glyph = (glyphs[0] if len(glyphs) == 1 else rng.choice(glyphs))[i]
        placed.append(Object(shape, color, glyph if rng.random() < marked else "", x, y, size))
    background = photographs.crop(rng, behind) if behind else _paper(rng)
    placed.sort(key=lambda o: o.x)
    tints = tuple(tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLORS[o.color]) for o in placed)
    return Scene(width, height, background, tuple(placed), tints)  # type: ignore[arg-type]


def _paper(rng: random.Random) -> tuple[int, int, int]:
    grey = rng.randint(222, 250)
    return tuple(max(0, min(255, grey + rng.randint(-8, 8))) for _ in range(3))  # type: ignore[return-value]


def draw(picture: Scene) -> Image.Image:
    """The scene as an RGB image."""
    size, rim = (picture.width, picture.height), 0.0
    if isinstance(picture.background, Crop):
        image, rim = picture.background.image(size), 2.5
    else:
        image = Image.new("RGB", size, picture.background)
    canvas = ImageDraw.Draw(image)
    for item, tint in zip(picture.objects, picture.tints, strict=True):
        dark = sum(tint) < 330 or item.color in ("blue", "purple", "red", "green")
        ink = (255, 255, 255) if dark else (0, 0, 0)
        if rim:
            # Without a rim, a red object on a red flower has no shape.
            _draw_shape(canvas, replace(item, size=item.size + rim), ink)
        _draw_shape(canvas, item, tint)
        if item.glyph:
            font = ImageFont.load_default(size=round(item.size * 0.5))
            # A triangle and a star are wider below and in the middle: their letter sits where there is room.
            drop = 0.14 * item.size if item.shape == "triangle" else 0
            canvas.text(
                (item.x, item.y + drop), item.glyph, fill=ink, font=font, anchor="mm", stroke_width=0.6, stroke_fill=ink
            )
    return image


def owners(picture: Scene) -> Image.Image:
    """An 8-bit image whose pixels hold 1 + the index of the object that covers them, 0 for the background."""
    image = Image.new("L", (picture.width, picture.height), 0)
    canvas = ImageDraw.Draw(image)
    for index, item in enumerate(picture.objects):
        _draw_shape(canvas, item, index + 1)
    return image


def _draw_shape(canvas: ImageDraw.ImageDraw, item: Object, fill: tuple[int, ...] | int) -> None:
    x, y, r = item.x, item.y, item.size / 2
    if item.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif item.shape == "square":
        canvas.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=fill)
    elif item.shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=fill)
    elif item.shape == "diamond":
        canvas.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    elif item.shape == "star":
        tips = [(r if i % 2 == 0 else 0.52 * r, math.pi * (i / 5 - 0.5)) for i in range(10)]
        canvas.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for d, a in tips], fill=fill)
    else:
        arm = 0.42 * r
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def question(picture: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """One question of ``kind`` with its answer, or None where the scene allows none without ambiguity."""
    options = _ASK[kind](picture, rng)
    return rng.choice(options) if options else None


def _color(picture: Scene, rng: random.Random) -> list[tuple[str, str]]:
    shapes = [o.shape for o in picture.objects]
    found = [(f"what color is the {o.shape}?", o.color) for o in picture.objects if shapes.count(o.shape) == 1]
    return found + [(f"what color is the object marked {o.glyph.lower()}?", o.color) for o in picture.objects if o.glyph]


def _shape(picture: Scene, rng: random.Random) -> list[tuple[str, str]]:
    colors = [o.color for o in picture.objects]
    found = [(f"what shape is the {o.color} object?", o.shape) for o in picture.objects if colors.count(o.color) == 1]
    return found + [(f"what shape is marked {o.glyph.lower()}?", o.shape) for o in picture.objects if o.glyph]


def _count(picture: Scene, rng: random.Random) -> list[tuple[str, str]]:
    color = rng.choice([rng.choice(list(COLORS)), rng.choice(picture.objects).color])
    shape = rng.choice([rng.choice(SHAPES), rng.choice(picture.objects).shape])
    plural = shape + ("es" if shape == "cross" else "s")
    return [
        ("how many objects are there?", str(len(picture.objects))),
        (f"how many {color} objects are there?", str(sum(o.color == color for o in picture.objects))),
        (f"how many {plural} are there?", str(sum(o.shape == shape for o in picture.objects))),
    ]


def _position(picture: Scene, rng: random.Random) -> list[tuple[str, str]]:
    by_x, by_y = list(picture.objects), sorted(picture.objects, key=lambda o: o.y)
    found = [("what is farthest left?", by_x[0].name), ("what is farthest right?", by_x[-1].name)]
    if by_y[1].y - by_y[0].y >= MIN_GAP:
        found.append(("what is at the top?", by_y[0].name))
    if by_y[-1].y - by_y[-2].y >= MIN_GAP:
        found.append(("what is at the bottom?", by_y[-1].name))
    # As many comparisons as extremes, so that each form is asked about half the time.
    for _ in range(len(found)):
        a, b = rng.sample(picture.objects, 2)
        if rng.random() < 0.5 and abs(a.y - b.y) >= MIN_GAP:
            found.append((f"is the {a.name} above the {b.name}?", "yes" if a.y < b.y else "no"))
        else:
            found.append((f"is the {a.name} left of the {b.name}?", "yes" if a.x < b.x else "no"))
    return found


def _letter(picture: Scene, rng: random.Random) -> list[tuple[str, str]]:
    marked = [(f"what is written on the {o.name}?", o.glyph.lower()) for o in picture.objects if o.glyph]
    plain = [(f"what is written on the {o.name}?", "nothing") for o in picture.objects if not o.glyph]
    # Reading is the point: an unmarked object is asked about one time in five.
    return plain if not marked or (plain and rng.random() < 0.2) else marked


def _caption(picture: Scene, rng: random.Random) -> list[tuple[str, str]]:
    return [(CAPTION_PROMPT, picture.caption)]


_ASK: dict[str, Callable[[Scene, random.Random], list[tuple[str, str]]]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "letter": _letter,
    "caption": _caption,
}
