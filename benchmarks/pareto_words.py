"""How ``pareto.md`` writes its numbers."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]
Point = dict[str, Any]


def plus_minus(found: Report) -> str:
    half = None if found["low"] is None else (found["high"] - found["low"]) / 2
    return percent(found["value"]) + ("" if half is None else f" ± {percent(half)}")


def interval(found: Report) -> str:
    """A difference in points, with its interval."""
    value = f"{100 * found['value']:+.1f}"
    if found["low"] is not None:
        value += f" ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
    return value.replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"
