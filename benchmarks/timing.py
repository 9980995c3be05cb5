"""One pass of one side over a workload, and many passes taken in turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one pass took, in seconds, and gave."""

    seconds: float
    """From JPEG files and prompts to texts."""
    preparing: float
    """Decoding and cutting images, tokenizing."""
    tower: float
    """The tower and the projector."""
    generation: float
    """Prefill, decoding and whatever schedules them: the calls to ``generate`` without the tower."""
    tokens: list[list[int]]
    """Output tokens of each row."""
    measured: dict[str, float] = field(default_factory=dict)
    """What only one side has to tell."""


Passes = dict[str, list[Pass]]
"""By contender."""


def take_turns(
    contenders: Mapping[str, Callable[[], Pass]],
    rounds: int,
    say: Callable[[str], object] = lambda line: None,
    more: Callable[[float], bool] = lambda seconds: True,
    once: Collection[str] = (),
) -> Passes:
    """Every contender's passes, one a round. Every other round goes backwards: a drift of the machine's speed hits all alike.

    ``more`` is asked before each round but the first whether another of so many seconds, the longest so far, may begin; those
    that run ``once``, in the first round, are not counted in.
    """
    passes: Passes = {name: [] for name in contenders}
    longest = 0.0
    for i in range(rounds):
        if i and not more(longest):
            say(f"no time for round {i + 1} of {rounds}")
            break
        took = 0.0
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            if i and name in once:
                continue
            # A pass pays for its own garbage alone.
            gc.collect()
            done = contenders[name]()
            passes[name].append(done)
            took += 0.0 if name in once else done.seconds
            say(f"round {i + 1} of {rounds}, {name}: {done.seconds:.1f} s")
        longest = max(longest, took)
    return passes


def synchronise(device: torch.device) -> None:
    """Waits for what the device has been given; a CPU is done by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and the middle half's ends."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def median_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """A median's interval, from order statistics: at least 95 % for whatever distribution (David and Nagaraja, Order
    Statistics, section 7.1); none below six values, which can't have one."""
    n, ordered = len(values), sorted(values)
    beyond = 0.0
    cut = 0
    while beyond + math.comb(n, cut) / 2**n <= 0.025:
        beyond += math.comb(n, cut) / 2**n
        cut += 1
    return (ordered[cut - 1], ordered[n - cut]) if cut else (None, None)


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians; least and most of the ratios within a round."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(above) / statistics.median(below), "min": min(rounds), "max": max(rounds)}
