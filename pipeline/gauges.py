"""What actors tell Ray's metrics, which Prometheus reads beside Ray's own: see ``ray.util.metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

PREFIX = "trimmed_mllama"


class Gauges:
    """One actor's. Says nothing where there is no Ray."""

    def __init__(self) -> None:
        self._on = ray.is_initialized()
        if not self._on:
            return
        self.rows = Counter(f"{PREFIX}_rows", "Rows written, those with an error among them")
        self.errors = Counter(f"{PREFIX}_errors", "Rows with an error", tag_keys=("kind",))
        self.tokens = Counter(f"{PREFIX}_output_tokens", "Tokens of all answers")
        self.encoded = Counter(f"{PREFIX}_images_encoded", "Images that went through the tower")
        self.hits = Counter(f"{PREFIX}_image_cache_hits", "Images that did not, as their like had")
        # Of images' keys and values, what rows share counted once.
        self.held = Counter(f"{PREFIX}_cross_kv_byte_seconds", "Cross KV bytes held, times the device's seconds")
        self.read = Counter(f"{PREFIX}_cross_kv_bytes_read", "Cross KV bytes that decoding read")
        self.peak = Gauge(f"{PREFIX}_peak_cross_kv_bytes", "Most cross KV bytes held at once")
        self.kept = Gauge(f"{PREFIX}_keep_fraction", "Share of the visual features kept, mean of the last unit")
        self.sequences = Gauge(f"{PREFIX}_sequences", "Rows that decode at present")

    def running(self, sequences: int) -> None:
        """How many rows decode now."""
        if self._on:
            self.sequences.set(sequences)

    def unit(self, stats: Mapping[str, Any]) -> None:
        """Takes a unit's statistics, as in its marker."""
        if not self._on:
            return
        counted = (
            (self.rows, "rows"),
            (self.tokens, "output_tokens"),
            (self.encoded, "images_encoded"),
            (self.hits, "image_hits"),
            (self.held, "cross_kv_byte_seconds"),
            (self.read, "cross_kv_bytes_read"),
        )
        for counter, name in counted:
            # Ray's counters refuse a zero.
            if stats[name]:
                counter.inc(stats[name])
        for kind, found in stats["error_kinds"].items():
            self.errors.inc(found["rows"], tags={"kind": kind[:100]})
        self.peak.set(stats["peak_cross_kv_bytes"])
        if stats["keep_fraction_rows"]:
            self.kept.set(stats["keep_fraction_sum"] / stats["keep_fraction_rows"])
