"""Prices of hardware by the hour, as they are stated; nothing is assumed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Price:
    """What an hour of one device costs: of a GPU, or of an actor on a CPU."""

    name: str
    dollars: float


def read_prices(given: Sequence[str], file: str | None) -> tuple[dict[str, float], list[str]]:
    """Dollars an hour by name, and the names that were typed.

    Args:
        given: ``NAME=DOLLARS`` each; they go before the file's.
        file: a YAML mapping of names to dollars.

    Raises ``ValueError`` for what is no price, or no positive number, and ``OSError`` for a file that can't be read.
    """
    prices: dict[str, float] = {}
    if file is not None:
        import yaml

        with open(file, encoding="utf-8") as handle:
            try:
                found = yaml.safe_load(handle)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"prices={file!r} is not YAML ({' '.join(str(error).split())[:200]})") from error
        if not isinstance(found, Mapping):
            raise ValueError(f"prices={file!r} holds no mapping; write lines such as 'h200: 3.5'")
        for name, dollars in found.items():
            prices[str(name)] = _dollars(str(name), dollars)
    typed: list[str] = []
    for text in given:
        name, equals, dollars = text.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"price={text!r} is not NAME=DOLLARS, such as h200=3.5")
        if name in typed:
            raise ValueError(f"price={text!r}: {name!r} has a price already; give one")
        typed.append(name)
        prices[name] = _dollars(name, dollars)
    for name in prices:
        if not words(name):
            raise ValueError(f"price {name!r} names no hardware; write a word of its name, such as h200=3.5")
    return prices, typed


def _dollars(name: str, value: Any) -> float:
    try:
        dollars = float(value)
    except (TypeError, ValueError):
        dollars = math.nan
    if isinstance(value, bool) or not math.isfinite(dollars) or dollars <= 0:
        raise ValueError(f"price {name}={value} is not a positive number of dollars an hour")
    return dollars


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[a-z0-9]+", text.casefold())


def match(device: str, prices: Mapping[str, float]) -> Price | None:
    """The price whose words stand, side by side, in the device's name; the longest of several, None without one.

    ``a100`` matches ``NVIDIA A100-SXM4-80GB``, and so does ``a100-sxm4``, which goes before it.
    """
    there = words(device)
    best: tuple[int, str] | None = None
    for name in prices:
        own = words(name)
        fits = any(there[i : i + len(own)] == own for i in range(len(there) - len(own) + 1))
        if own and fits and (best is None or len("".join(own)) > best[0]):
            best = len("".join(own)), name
    return None if best is None else Price(best[1], prices[best[1]])


def check_typed(typed: Sequence[str], devices: Sequence[str]) -> None:
    """Raises ``ValueError`` for a typed price that fits no device: most likely a slip of the pen. A file may list more hardware
    than these runs had."""
    for name in typed:
        if not any(match(device, {name: 1.0}) for device in devices):
            there = ", ".join(repr(device) for device in dict.fromkeys(devices))
            raise ValueError(f"price {name!r} matches no run's hardware, which is {there}")


def blend(device_seconds: Mapping[str, float], prices: Mapping[str, float]) -> Price | None:
    """One price for a run on several devices: the mean of theirs, weighted by the time on each. None where one has no price."""
    found = {device: match(device, prices) for device in device_seconds}
    matched = {device: price for device, price in found.items() if price is not None}
    if not matched or len(matched) < len(found):
        return None
    names = dict.fromkeys(price.name for price in matched.values())
    if len(names) == 1:
        return next(iter(matched.values()))
    total = sum(device_seconds.values())
    share = {device: seconds / total if total else 1 / len(device_seconds) for device, seconds in device_seconds.items()}
    return Price(" and ".join(names), sum(share[device] * price.dollars for device, price in matched.items()))
