"""What a run cost: time, money, memory, and how its rows are distributed, in one pass over its columns."""

from __future__ import annotations

import math
from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.comparison.prices import Price
from jobs.comparison.runs import Run
from jobs.report import held_of_full
from pipeline import schema

COLUMNS = ("output_tokens", "tiles", schema.IMAGE_DIGEST, schema.KEEP_FRACTION)
"""What ``Distributions`` reads of a row."""
KEPT_BINS = 20
FRACTION_STEPS = 10_000
_HOUR = 3600.0
MILLION = 1_000_000


def speed(run: Run) -> dict[str, float | None]:
    """Per GPU, or on a CPU per actor: ``gpu_seconds``, ``images_per_second`` and ``output_tokens_per_second``.

    GPU seconds are the actors' seconds from when each was ready to the end of its last unit, times the GPUs each held. Images
    are counted as often as rows ask about them, in rows that were answered. Rates are None where no time was taken.
    """
    seconds = sum(run.device_seconds.values())
    return {
        "gpu_seconds": seconds,
        "images_per_second": run.stats["images"] / seconds if seconds else None,
        "output_tokens_per_second": run.stats["output_tokens"] / seconds if seconds else None,
    }


def cost(run: Run, price: Price | None) -> dict[str, Any]:
    """GPU hours (on a CPU: actor hours) and dollars for a million images; None without images, dollars None without a price."""
    images = run.stats["images"]
    hours = sum(run.device_seconds.values()) / _HOUR * MILLION / images if images else None
    return {
        "price": price.dollars if price else None,
        "price_name": price.name if price else None,
        "gpu_hours_per_million_images": hours,
        "dollars_per_million_images": hours * price.dollars if price and hours is not None else None,
    }


def peaks(run: Run) -> dict[str, int | None]:
    """The most that any one actor had at once; None where the run did not record it."""
    names = {"memory_bytes": "peak_memory_bytes", "sequences": "peak_sequences"}
    names |= {"kv_bytes": "peak_kv_bytes", "cross_kv_bytes": "peak_cross_kv_bytes"}
    return {name: run.stats.get(recorded) or None for name, recorded in names.items()}


def held(run: Run) -> dict[str, float | None]:
    """What the machine held and read of images' keys and values, what rows share counted once; None where a unit lacks it.

    ``byte_seconds``: bytes times the seconds of tower, prefill and decode that they were held for, and ``_per_row`` that is
    answered. ``of_full``: over the same with all features kept, which is computed. ``bytes_read``: what decode steps attended
    to, and ``_per_token`` of all answers. The most held at once is in ``peaks``.
    """
    byte_seconds, read = run.stats["cross_kv_byte_seconds"], run.stats["cross_kv_bytes_read"]
    rows, tokens = run.answered, run.stats["output_tokens"]
    return {
        "byte_seconds": byte_seconds,
        "byte_seconds_per_row": byte_seconds / rows if rows and byte_seconds is not None else None,
        "of_full": held_of_full(run.stats),
        "bytes_read": read,
        "bytes_read_per_token": read / tokens if tokens and read is not None else None,
    }


def row_kv(run: Run) -> dict[str, float | None]:
    """Bytes of rows' own caches, each as if no other row shared it, in all and by answered row: ``cross`` as kept,
    ``cross_full`` as if all were, ``self``."""
    recorded = {"cross": "cross_kv_bytes", "cross_full": "cross_kv_bytes_full", "self": "self_kv_bytes"}
    totals = {name: run.stats[key] for name, key in recorded.items()}
    rows = run.answered
    return {f"{name}_total": total for name, total in totals.items()} | {
        f"{name}_per_row": total / rows if rows else None for name, total in totals.items()
    }


def stages(run: Run) -> dict[str, float]:
    """Seconds by stage, summed over actors; decoding of images runs beside the others."""
    return dict(run.stats["seconds_per_stage"])


class Distributions:
    """How rows are distributed. Add a run's rows in tables, in any order; memory follows from distinct values and images, at
    eight bytes a row with an image, not from texts.

    Exact: everything about output tokens, tiles and questions per image (but for two images in about 10¹⁹ whose 64-bit hashes
    are equal), the kept fraction's mean, standard deviation and histogram. The kept fraction's percentiles are right to half
    of 1 / ``FRACTION_STEPS``.
    """

    def __init__(self) -> None:
        self.tokens: Counter[int] = Counter()
        self.tiles: Counter[int] = Counter()
        self.asked: list[np.ndarray] = []
        self.fractions = np.zeros(FRACTION_STEPS + 1, np.int64)
        self.bins = np.zeros(KEPT_BINS, np.int64)
        self.edges = np.linspace(0, 1, KEPT_BINS + 1)
        self.sum = self.squares = 0.0

    def add(self, table: pa.Table) -> None:
        """Adds rows with ``COLUMNS``; those with an error have an image, and null for all else."""
        self.asked.append(hashes(table[schema.IMAGE_DIGEST].drop_null()))
        _count(self.tokens, table["output_tokens"])
        _count(self.tiles, table["tiles"])
        kept = table[schema.KEEP_FRACTION].drop_null().to_numpy()
        self.fractions += np.bincount(np.rint(kept * FRACTION_STEPS).astype(np.int64), minlength=FRACTION_STEPS + 1)
        self.bins += np.histogram(kept, self.edges)[0]
        self.sum += float(kept.sum())
        self.squares += float(np.square(kept).sum())

    def output_tokens(self) -> dict[str, float | None]:
        """``mean``, ``p5`` … ``p99`` and ``max`` over answered rows; all None without any."""
        values, counts = _sorted(self.tokens)
        rows = int(counts.sum())
        found: dict[str, float | None] = {"mean": float(values @ counts / rows) if rows else None}
        found |= {f"p{p}": _percentile(values, counts, p) for p in (5, 50, 95, 99)}
        return found | {"max": int(values[-1]) if rows else None}

    def tiles_per_row(self) -> list[list[int]]:
        """[tiles, answered rows], ascending."""
        return [[tiles, rows] for tiles, rows in sorted(self.tiles.items())]

    def questions_per_image(self) -> dict[str, Any]:
        """``mean`` and ``histogram`` ([questions, images], ascending) of rows with one and the same image or images."""
        hashed = np.concatenate(self.asked) if self.asked else np.zeros(0, np.uint64)
        _, asked = np.unique(hashed, return_counts=True)
        questions, images = np.unique(asked, return_counts=True)
        histogram = [[int(q), int(i)] for q, i in zip(questions, images, strict=True)]
        return {"mean": float(asked.mean()) if len(asked) else None, "histogram": histogram}

    def kept(self) -> dict[str, Any] | None:
        """The kept fraction over answered rows with images; None without any."""
        rows = int(self.fractions.sum())
        if not rows:
            return None
        steps = np.arange(FRACTION_STEPS + 1) / FRACTION_STEPS
        mean = self.sum / rows
        return {
            "mean": mean,
            "std": math.sqrt(max(0.0, self.squares / rows - mean**2)),
            **{f"p{p}": _percentile(steps, self.fractions, p) for p in (5, 50, 95)},
            "histogram": {"edges": self.edges.tolist(), "counts": self.bins.tolist()},
        }


def hashes(texts: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(rows,) uint64 of (rows,) strings without nulls, the same in every process; each distinct text is hashed once."""
    coded = pc.dictionary_encode(texts)
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    if isinstance(coded, pa.ChunkedArray):
        coded = pa.concat_arrays(coded.chunks) if coded.num_chunks else pa.array([], pa.string()).dictionary_encode()
    each = [int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) for text in coded.dictionary.to_pylist()]
    return np.array(each, np.uint64)[coded.indices.to_numpy(zero_copy_only=False)]


def _count(counter: Counter[int], column: pa.ChunkedArray) -> None:
    for one in pc.value_counts(column.drop_null()):
        counter[one["values"].as_py()] += one["counts"].as_py()


def _sorted(counter: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(sorted(counter), np.int64)
    return values, np.array([counter[int(value)] for value in values], np.int64)


def _percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float | None:
    """The least of ascending ``values`` that ``percent`` of the rows do not exceed; None without rows."""
    rows = int(counts.sum())
    if not rows:
        return None
    place = np.searchsorted(np.cumsum(counts), math.ceil(percent / 100 * rows))
    return values[place].item()
