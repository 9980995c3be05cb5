"""How much the GPU benchmark measures. Imports nothing heavy: ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuAmounts:
    """The defaults end within nine minutes on an H200."""

    tiny: bool = False
    """The tiny model instead of Llama-3.2-11B-Vision's geometry."""
    minutes: float = 8.5
    """From the start of the program: nothing begins that would probably end later."""
    matmul: int = 8192
    """Sides of the square matrices whose product is timed."""
    copy_bytes: int = 2 << 30
    """What is copied from device to device; it is read and written."""
    repeats: int = 10
    """Measures of either rate."""
    tower_images: int = 8
    """That go through the tower at once."""
    tower_runs: int = 5
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences of a decode step, beside as many as fit."""
    prompt: int = 256
    """Tokens of each sequence's prompt,"""
    said: int = 64
    """and those that it has generated when a step is timed."""
    steps: int = 20
    """Decode steps a batch size is timed over."""
    captions: int = 128
    """Captioning images, one prompt each."""
    peer_batches: tuple[int, ...] = (8, 16, 32, 64)
    """Static batches that the peer is tried with."""
    swept_rows: int = 32
    """A trial takes the fewest whole batches that have so many rows."""
    rounds: int = 2
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
    batches=(1, 2, 4, 64),
    prompt=12,
    said=4,
    steps=3,
    captions=6,
    peer_batches=(2, 4),
    swept_rows=4,
    rounds=1,
    kv_bytes=1 << 18,
)
"""Shows that everything runs, and measures nothing."""
