"""How much is measured. Imports nothing heavy: ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

TOWER_KEEP = 0.45
"""Share of rows × layers left by the contenders that merge in the tower: one at which the demo's second model, with as many
rows a tile as the one measured here, is not shown to lose (demo/results/accuracy.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amounts:
    """The defaults end within three quarters of an hour on two cores."""

    tiny: bool = False
    """The tiny model instead of the one with Llama-3.2-Vision's proportions."""
    captions: int = 128
    """Captioning images, one prompt each."""
    questions: int = 26
    """Images with five questions each."""
    four_tiles: int = 96
    """Four-tile images of the load that decoding is measured on: more than run at once, also where most are trimmed."""
    growth_rows: int = 40
    """Questions that are asked about ever fewer images: a multiple of each number of questions an image."""
    share_rows: int = 32
    """Four-tile images that decoding is timed on at several kept shares,"""
    share_length: int = 32
    """and tokens of each answer."""
    turns: int = 3
    """Passes of each of these two."""
    prefills: int = 20
    """Prompts of the prefills that selection is measured on."""
    selection_turns: int = 16
    """Such prefills with each policy."""
    clusterings: int = 5
    """Times that a part of the captioning images are encoded, and merged, for what merging takes."""
    rounds: int = 3
    """Passes of every other contender, at most."""
    minutes: float = 48.0
    """No round begins that would not end in this time, what comes after it included."""
    max_sequences: int = 128
    """Rows that the engine decodes at once, at most: the peer's largest batch."""
    budget_sequences: int = 8
    """Untrimmed four-tile rows that the fixed budget of KV bytes has room for."""
    seed: int = 0


QUICK = Amounts(
    tiny=True,
    captions=8,
    questions=2,
    four_tiles=6,
    growth_rows=20,
    share_rows=4,
    share_length=4,
    turns=1,
    prefills=5,
    selection_turns=2,
    clusterings=2,
    rounds=1,
    max_sequences=4,
    budget_sequences=2,
)
"""Shows that everything runs, and measures nothing."""
