"""Intervals by a bootstrap over images: questions about one image are not independent of each other, so images are drawn whole.

The statistic is a mean over rows, as a ratio of sums over images: all values / all rows. For a difference the values are paired
differences, a row's in one run less the same row's in the other, so that what makes a row hard in both runs cancels out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

REPLICATES = 2000
SEED = 20_250_401
CONFIDENCE = 0.95
POWER = 0.8
MOST_GROUPS = 4096
"""Distinct (rows, sum) of images up to which each is a group of its own."""
BINS_PER_DEVIATION = 50
_CHUNK = 2**24

Verdict = Literal["better", "worse", "higher", "lower", "not distinguishable"]
# Standard normal quantiles of 1 - (1 - CONFIDENCE) / 2 and of POWER.
_Z_CONFIDENCE, _Z_POWER = 1.959964, 0.841621


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over rows with its 95 % interval. The value is None without rows, the interval without two images: nothing is
    known then of how images differ."""

    value: float | None
    low: float | None
    high: float | None
    rows: int
    clusters: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Values summed up by image.

    Attributes:
        sums: (images,) float64, the sum of the values of an image's rows.
        counts: (images,) int64, its rows.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, values: np.ndarray) -> Clusters:
        """From (rows,) keys of images and (rows,) values; rows whose value is NaN have none and are left out."""
        there = ~np.isnan(values)
        unique, places = np.unique(keys[there], return_inverse=True)
        counts = np.bincount(places, minlength=len(unique)).astype(np.int64)
        return cls(np.bincount(places, weights=values[there], minlength=len(unique)), counts)

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def value(self) -> float | None:
        return float(self.sums.sum() / self.counts.sum()) if len(self.counts) else None

    @property
    def error(self) -> float:
        """Standard error of ``value``, by linearising the ratio (the delta method); NaN below two images."""
        n = len(self.counts)
        if n < 2:
            return math.nan
        residuals = self.sums - self.value * self.counts
        return float(math.sqrt(np.square(residuals).sum() * n / (n - 1)) / self.counts.sum())


def score(clusters: Clusters) -> Score:
    """The mean and its percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3)."""
    value, low, high = clusters.value, None, None
    if len(clusters.counts) > 1:
        drawn = replicates(clusters)
        low, high = (float(edge) for edge in np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
        if np.ptp(clusters.sums / clusters.counts) == 0:
            # Images that are all alike make no spread; what is left is the rounding of sums.
            low = high = value
    return Score(value, low, high, clusters.rows, len(clusters.counts))


def difference(clusters: Clusters, kind: Literal["quality", "amount"]) -> dict[str, Any]:
    """A ``Score`` of paired differences with ``verdict`` and ``rows_that_would_tell``.

    ``kind`` says what a positive difference is: ``better`` (quality) or just ``higher`` (amount). A difference is
    distinguishable where the interval lies on one side of 0.
    """
    found = score(clusters)
    verdict: Verdict = "not distinguishable"
    if found.low is not None and found.high is not None:
        words: tuple[Verdict, Verdict] = ("better", "worse") if kind == "quality" else ("higher", "lower")
        verdict = words[0] if found.low > 0 else words[1] if found.high < 0 else verdict
    needed = rows_that_would_tell(clusters) if verdict == "not distinguishable" else None
    return {**found.as_dict(), "verdict": verdict, "rows_that_would_tell": needed}


def rows_that_would_tell(clusters: Clusters) -> int | None:
    """Rows, at the same questions an image, in which a difference as large as the one seen would be found with 80 % power by a
    two-sided test at 5 %: by the normal approximation, rows × ((1.96 + 0.84) × standard error / difference)².

    More than there are; None where the difference is exactly 0, and below two images.
    """
    value, error = clusters.value, clusters.error
    if not value or math.isnan(error):
        return None
    needed = clusters.rows * ((_Z_CONFIDENCE + _Z_POWER) * error / value) ** 2
    return max(clusters.rows + 1, math.ceil(needed)) if math.isfinite(needed) else None


def replicates(clusters: Clusters, count: int = REPLICATES, seed: int = SEED) -> np.ndarray:
    """(count,) bootstrap replicates of the ratio: as many images as there are, drawn with replacement.

    Images of one group are alike, so what is drawn is how often each *group* occurs, multinomially: the same distribution, at a
    cost that follows from the groups and not from the images.
    """
    sums, counts, sizes = groups(clusters)
    random = np.random.default_rng(seed)
    n, shares = len(clusters.counts), sizes / sizes.sum()
    drawn = np.empty(count)
    step = max(1, _CHUNK // len(sizes))
    for start in range(0, count, step):
        often = random.multinomial(n, shares, size=min(step, count - start))
        drawn[start : start + step] = (often @ sums) / (often @ counts)
    return drawn


def groups(clusters: Clusters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images alike in rows and sum: (groups,) ``sums`` and ``counts`` of one image, and ``sizes`` in images, in a fixed order.

    Up to ``MOST_GROUPS`` that is exact. Beyond, images of as many rows form a group where their sums fall into one bin, a
    fiftieth of the images' standard deviation wide, and stand for each other by their mean: the total stays what it is, and the
    variance loses at most a ten-thousandth.
    """
    counts, sums = clusters.counts, clusters.sums
    places = _places(counts, sums)
    if places.max(initial=0) >= MOST_GROUPS:
        # The variance within a bin of width w is at most w² / 4: (1/50)² / 4 of the images' own.
        width = float(np.std(sums - (clusters.value or 0.0) * counts)) / BINS_PER_DEVIATION
        places = _places(counts, np.floor(sums / width)) if width > 0 else places
    sizes = np.bincount(places)
    return np.bincount(places, weights=sums) / sizes, np.bincount(places, weights=counts) / sizes, sizes


def _places(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """(images,) the place of each image's (count, sum) among the distinct ones in their order."""
    order = np.lexsort((sums, counts))
    new = (np.diff(counts[order]) != 0) | (np.diff(sums[order]) != 0)
    places = np.empty(len(order), np.int64)
    places[order] = np.concatenate([[0], np.cumsum(new)])
    return places
