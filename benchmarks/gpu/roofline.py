"""What a device can do at best, measured: the rate of large matrix products and the bandwidth of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.timing import synchronise
from trimming.costs import Cost

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

QUEUED = 10
"""Products or copies that are queued behind each other for one measure: then no launch is waited for."""


@dataclass(frozen=True, slots=True)
class Rates:
    """One device's, in bf16."""

    matmul: float
    """Floating-point operations a second, two a multiply-add."""
    copy: float
    """Bytes a second, those read and those written together."""

    def floor(self, calls: Iterable[Cost]) -> float:
        """Seconds that these calls, one after the other, take at least: the roofline."""
        return sum(call.seconds(self.matmul, self.copy) for call in calls)

    def bound(self, call: Cost) -> str:
        """Which of the two rates holds ``call`` up."""
        return "matmul" if call.operations / self.matmul > call.bytes / self.copy else "copy"


def measure_roofline(bench: Bench, out: dict[str, Any]) -> None:
    """Fills ``out`` with both rates."""
    out |= rates_of(bench)
    rates = bench.rates
    bench.say(f"roofline: {rates.matmul / 1e12:.4g} TFLOP/s and {rates.copy / 1e9:.4g} GB/s")


def rates_of(bench: Bench) -> dict[str, Any]:
    """Both rates, and what they were measured with."""
    return {
        "matmul_operations_per_second": bench.rates.matmul,
        "copy_bytes_per_second": bench.rates.copy,
        "matmul_side": bench.amounts.matmul,
        "copied_bytes": bench.amounts.copy_bytes,
    }


def measured(calls: Sequence[Cost], seconds: Sequence[float], rates: Rates) -> dict[str, Any]:
    """What one way of running ``calls``, one after the other, took, beside the roofline."""
    median, floor = statistics.median(seconds), rates.floor(calls)
    return {
        "seconds": median,
        "spread": [min(seconds), max(seconds)],
        "operations": sum(call.operations for call in calls),
        "bytes": sum(call.bytes for call in calls),
        "roofline_seconds": floor,
        "roofline_share": floor / median,
    }


def measure_rates(device: torch.device, side: int, copy_bytes: int, repeats: int) -> Rates:
    """Medians of ``repeats`` measures.

    Args:
        side: of the square bf16 matrices, of random numbers: a device is faster at zeros, which draw less power.
        copy_bytes: taken twice, for the original and the copy.
    """
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    multiplying = _median(device, lambda: torch.mm(left, right, out=product), repeats)
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = _median(device, lambda: target.copy_(source), repeats)
    return Rates(2 * side**3 / multiplying, 2 * copy_bytes / copying)


def _median(device: torch.device, run: Callable[[], object], repeats: int) -> float:
    queued_seconds(device, run, QUEUED)
    return statistics.median(queued_seconds(device, run, QUEUED) for _ in range(repeats))


def queued_seconds(device: torch.device, run: Callable[[], object], count: int) -> float:
    """Seconds a call of ``count`` calls that the host does not wait for one by one: the device's own time, where it is the
    slower of the two."""
    synchronise(device)
    if device.type != "cuda":
        return sum(each_seconds(device, run, count)) / count
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(count):
        run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / count


def each_seconds(device: torch.device, run: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, from an idle device to an idle device: the host's part included."""
    seconds = []
    for _ in range(count):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return seconds
