"""What one prefill did to each sample's key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import LongTensor, Tensor

from trimming.costs import Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTrim:
    """One sample of the last prefill. Bytes count keys and values in the cache's own dtype, over all layers of their kind."""

    visual_tokens: int
    """Valid visual features: those of real tiles that some text row sees. 0 for a text-only row."""
    kept_visual_tokens: int
    """Valid visual features that stayed; where layers or heads keep sets of their own, their mean, to the nearest."""
    kept: LongTensor
    """Kept positions, ascending, on the model's own images × tiles × tokens axis, padding tiles counted in: in any layer or
    head, where they keep sets of their own.

    Under ``rows="transformers"`` a sample that keeps every valid feature keeps its padding tiles' too, as rows before the
    image attend to them there: then this is longer than ``kept_visual_tokens``.
    """
    cross_kv_bytes_full: int
    """Valid features × bytes a feature."""
    cross_kv_bytes: int
    """Kept valid features × bytes a feature; what is really held where layers, heads or channels differ."""
    cross_kv_bytes_allocated: int
    """What the cache really holds for the sample: under ``trim`` padded to the longest of its batch; in the engine its segment,
    which other sequences may share."""
    merged_into: LongTensor | None = None
    """(N,) on the same axis: the kept position of the feature that each position's is in, its own where it stayed, −1 where it
    went; None where nothing was merged, or only by each layer for itself."""
    tower_keep_fraction: float | None = None
    """Share of rows × layers that the vision tower was left with, of its images' real tiles; None without any."""
    self_kv_bytes: int
    """Prompt tokens (padding left out) × bytes a token over the self-attention layers."""

    @property
    def keep_fraction(self) -> float | None:
        """Kept share of the valid features; None without any."""
        return self.kept_visual_tokens / self.visual_tokens if self.visual_tokens else None

    @classmethod
    def of(
        cls,
        real: Tensor,
        keep: Tensor,
        prompt_tokens: int,
        geometry: Geometry,
        itemsize: int,
        allocated: int,
        rows: Sequence[int] | None = None,
        key_width: int | None = None,
        biases: int = 0,
        merged_into: Tensor | None = None,
        tower_keep_fraction: float | None = None,
    ) -> SampleTrim:
        """The record of a sample whose real tiles' and kept positions are (N,) bool; numbers in the cache take ``itemsize``.

        ``rows``: the kept features of each cross-attention layer, where they differ; ``key_width``: the channels of a head's
        keys that stay, where not all do; ``biases``: how many a feature and head have, of four bytes.
        """
        there, cross = int(real.sum()), geometry.cross_kv_bytes(itemsize)
        stayed = int((keep & real).sum()) if rows is None else round(sum(rows) / len(rows))
        held = stayed * geometry.cross_layers if rows is None else sum(rows)
        biased = min(biases, 1) * stayed if rows is None else sum(rows[:biases])
        width = geometry.head_dim + (geometry.head_dim if key_width is None else key_width)
        return cls(
            visual_tokens=there,
            kept_visual_tokens=stayed,
            kept=keep.nonzero()[:, 0],  # type: ignore[arg-type]
            cross_kv_bytes_full=there * cross,
            cross_kv_bytes=held * geometry.kv_heads * width * itemsize + 4 * geometry.kv_heads * biased,
            cross_kv_bytes_allocated=allocated,
            merged_into=merged_into,  # type: ignore[arg-type]
            tower_keep_fraction=tower_keep_fraction if there else None,
            self_kv_bytes=prompt_tokens * geometry.self_kv_bytes(itemsize),
        )
