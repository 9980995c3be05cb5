"""Where a call's time goes: its longest kernels, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronise

LONGEST = 10


def longest_kernels(device: torch.device, run: Callable[[], object]) -> dict[str, Any]:
    """Of one call: ``kernels`` (its launches), ``seconds`` that the device was busy in them, and the ``longest`` by name with
    their calls, seconds and share. On a CPU operators stand in for kernels. One call first goes unrecorded: starting the
    profiler takes its time."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(2):
        with profile(activities=activities) as profiler:
            run()
            synchronise(device)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    times = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 for event in events}
    total = sum(times.values())
    ranked = sorted(events, key=lambda event: times[event.key], reverse=True)[:LONGEST]
    return {
        "kernels": sum(event.count for event in events),
        "seconds": total,
        "longest": [
            {
                "name": event.key[:100],
                "calls": event.count,
                "seconds": times[event.key],
                "share": times[event.key] / total if total else 0.0,
            }
            for event in ranked
        ],
    }
