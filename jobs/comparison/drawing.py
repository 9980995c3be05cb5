"""What the report's plots share: their look, and a figure of matplotlib's as an SVG for the middle of a page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.comparison import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#24292f", "#d3d8de"
"""Texts and rules; a page may put its own colours in their place."""
# Okabe and Ito's, which the colour-blind tell apart, in an order that also differs in lightness; a shape to each.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FIELD = 4.5
"""Width of a plot in inches, at 9.5 points: read as it is, and still when shrunk to a phone's."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.parse_math": False,  # a run's name may hold dollar signs
}


@dataclass(frozen=True, slots=True)
class Plot:
    name: str
    """Unique in the report; a file's name."""
    title: str
    text: str
    """What it shows, for who does not see it."""
    svg: str
    small: bool = False
    """One of several that stand side by side."""


class Drawing:
    """A figure of ``width`` × ``height`` inches with one set of axes, and what makes a ``Plot`` of it once it is drawn."""

    def __init__(self, name: str, width: float, height: float) -> None:
        self.name, self.width, self.height = name, width, height

    def __enter__(self) -> tuple[Figure, Axes, Callable[..., Plot]]:
        import matplotlib
        from matplotlib.figure import Figure

        # Ids are hashes with this salt: the same in each report, and another's in each plot of a page.
        self.contexts = ExitStack()
        self.contexts.enter_context(matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": self.name}))
        self.contexts.enter_context(warnings.catch_warnings())
        # Only widths are measured here; the reader's fonts draw the letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        self.figure = Figure((self.width, self.height), layout="constrained")
        self.figure.patch.set_alpha(0)
        axes = self.figure.add_subplot()
        axes.patch.set_alpha(0)
        return self.figure, axes, self.made

    def __exit__(self, *raised: object) -> None:
        self.contexts.close()

    def made(self, title: str, text: str, small: bool = False) -> Plot:
        out = io.StringIO()
        self.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        return Plot(self.name, title, text, _embeddable(out.getvalue(), self.name, text), small)


def _embeddable(svg: str, name: str, text: str) -> str:
    """An SVG for the middle of a page: without a prolog, with ids that no other plot has, and with its text."""
    svg, text = words.printable(svg[svg.index("<svg") :]), words.printable(text)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^\"]*sans-serif", r"font: \1system-ui, sans-serif", svg)
    head, rest = svg.split(">", 1)
    return f'{head} role="img" aria-labelledby="{name}-title"><title id="{name}-title">{html.escape(text)}</title>{rest}'


def as_file(plot: Plot) -> str:
    """The plot as a file of its own, on white: a viewer may be dark."""
    head, rest = plot.svg.split("</title>", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}</title><rect width="100%" height="100%" fill="#ffffff"/>{rest}'


def percent(*axes: Any, decimals: int | None = None) -> None:
    from matplotlib.ticker import PercentFormatter

    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0, decimals))


def short(text: str, most: int = 40) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
