"""What the sections of the GPU benchmark have in common: the device, the clock, the model, and where results go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.gpu.amounts import GpuAmounts
from benchmarks.gpu.model import ELEVEN_B, build_on
from benchmarks.gpu.results import Result
from benchmarks.gpu.roofline import Rates, measure_rates
from benchmarks.model import TINY, ModelSize, build_processor
from trimming.costs import Costs


class SectionError(RuntimeError):
    """What a section found wrong, in one line; everything it measured is in its results."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """Turns TF32 off for matrix products and for convolutions, where torch allows it by default."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


@dataclass(kw_only=True)
class Bench:
    """One run. The rates and the large model are made when a section first asks for them."""

    device: torch.device
    amounts: GpuAmounts
    save: Callable[[], object]
    """Writes what is measured so far: a section calls it after every figure."""
    say: Callable[[str], object]
    """Takes a line of progress."""
    deadline: float = float("inf")
    """``time.monotonic()`` at which the present section has to end."""

    @property
    def size(self) -> ModelSize:
        return TINY if self.amounts.tiny else ELEVEN_B

    @cached_property
    def rates(self) -> Rates:
        """The device's, measured now if nobody has."""
        amounts = self.amounts
        return measure_rates(self.device, amounts.matmul, amounts.copy_bytes, amounts.repeats)

    @cached_property
    def processor(self) -> MllamaProcessor:
        return build_processor(self.size)

    @cached_property
    def model(self) -> MllamaForConditionalGeneration:
        return build_on(self.device, self.size, self.processor, self.amounts.seed)

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.model.config, self.model.dtype.itemsize)

    def has(self, seconds: float) -> bool:
        """Whether the section has time for something of this length."""
        return time.monotonic() + seconds < self.deadline

    def release(self) -> None:
        """Hands memory that nothing holds back to the device, and begins a new peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def allocator(self) -> Result:
        """Counts of torch's allocator in this process: how often it had to hand memory back before it got more, which
        fragmentation brings about and which waits for the device, and how often there was none."""
        if self.device.type != "cuda":
            return {}
        said = torch.cuda.memory_stats(self.device)
        return {name: said.get(key, 0) for name, key in (("retries", "num_alloc_retries"), ("refusals", "num_ooms"))}

    def peak_bytes(self) -> int | None:
        """Most memory in use since ``release``; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
