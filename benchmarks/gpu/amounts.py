"""The sections of the GPU kit, their time, and how much they measure. Imports nothing heavy: ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

SECTIONS: dict[str, float] = {
    "correct": 60,
    "answers": 60,
    "roofline": 30,
    "tower": 40,
    "prefill": 25,
    "decode": 55,
    "captioning": 150,
    "questions": 60,
}
"""In the order of their worth, with the seconds that each may take: eight minutes together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuAmounts:
    """The defaults are for an H100 or H200."""

    tiny: bool = False
    """The tiny model instead of Llama-3.2-11B-Vision's geometry."""
    matmul: int = 8192
    """Sides of the square matrices whose product is timed."""
    copy_bytes: int = 2 << 30
    """What is copied from device to device; it is read and written."""
    repeats: int = 10
    """Measures of either rate."""
    tower_images: int = 8
    """That go through the tower at once."""
    tower_runs: int = 5
    attention_lengths: int = 6
    """New prompt lengths that attention backends are timed with."""
    prefills: tuple[int, ...] = (1, 16)
    """Prompts that are prefilled at once."""
    prefill_runs: int = 5
    caption_prompt: int = 32
    """Tokens of a caption's prompt."""
    batches: tuple[int, ...] = (8, 32, 128)
    """Sequences of a decode step."""
    prompt: int = 256
    """Tokens of each sequence's prompt,"""
    said: int = 64
    """and those that it has generated when a step is timed."""
    steps: int = 20
    """Decode steps a batch size is timed over."""
    captions: int = 64
    """Captioning images of one pass, one prompt each."""
    peer_batches: tuple[int, ...] = (32, 64)
    """Static batches that the peer is tried with: a step costs it about as much for 16 rows. 64 may be more than fits."""
    swept_rows: int = 32
    """A trial takes the fewest whole batches that have so many rows."""
    question_images: int = 16
    """Images of one pass of questions, five on each."""
    rounds: int = 3
    """Timed passes of each contender, at most."""
    kv_bytes: int | None = None
    """Room for the caches of the decode section; None takes what the device has to spare."""
    seed: int = 0


TINY_GPU = GpuAmounts(
    tiny=True,
    matmul=64,
    copy_bytes=1 << 20,
    repeats=3,
    tower_images=2,
    tower_runs=2,
    attention_lengths=2,
    prefills=(1, 3),
    prefill_runs=2,
    caption_prompt=8,
    batches=(2, 4),
    prompt=12,
    said=4,
    steps=3,
    captions=6,
    peer_batches=(2, 4),
    swept_rows=4,
    question_images=2,
    rounds=1,
    kv_bytes=1 << 18,
)
"""Shows that everything runs, and measures nothing."""
