"""Trimmed-Llama for ``transformers``: cross-attention caches that hold only the visual features worth keeping.

    with trim(model, TrimmedLlama(k_ratio=0.25)) as trimmed:
        model.generate(**inputs)
    trimmed.samples[0].keep_fraction

Method: arXiv 2504.00557. This package knows torch and transformers; it never imports ray or pyarrow.
"""

from trimming.mllama import Rows, Trimmed, trim
from trimming.policies import (
    Clusters,
    DivPrune,
    ElasticCache,
    FastV,
    Grid,
    KeepAll,
    Policy,
    Random,
    SnapKV,
    Spread,
    ThinK,
    TrimmedLlama,
    VisionZip,
    VisualContext,
    WeightedFarthest,
    ZipVL,
)
from trimming.samples import SampleTrim

__all__ = [
    "Clusters",
    "DivPrune",
    "ElasticCache",
    "FastV",
    "Grid",
    "KeepAll",
    "Policy",
    "Random",
    "Rows",
    "SampleTrim",
    "SnapKV",
    "Spread",
    "ThinK",
    "Trimmed",
    "TrimmedLlama",
    "VisionZip",
    "VisualContext",
    "WeightedFarthest",
    "ZipVL",
    "trim",
]
