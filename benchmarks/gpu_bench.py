"""What the sections of the GPU benchmark have in common: the device, the model, the clock, and where results go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.gpu_amounts import GpuAmounts
from benchmarks.model import ModelSize
from benchmarks.roofline import Rates
from trimming.costs import Costs

Result = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Bench:
    """One run."""

    device: torch.device
    amounts: GpuAmounts
    size: ModelSize
    model: MllamaForConditionalGeneration
    processor: MllamaProcessor
    rates: Rates
    save: Callable[[], object]
    """Writes what is measured so far: a section calls it after every figure."""
    say: Callable[[str], object]
    """Takes a line of progress."""
    began: float
    """``time.monotonic()`` of the program's start."""
    costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        self.costs = Costs(self.model.config, self.model.dtype.itemsize)

    def has(self, seconds: float) -> bool:
        """Whether there is time for something of this length."""
        return time.monotonic() - self.began + seconds < self.amounts.minutes * 60

    def release(self) -> None:
        """Hands memory that nothing holds back to the device, and begins a new peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Most memory in use since ``release``; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
