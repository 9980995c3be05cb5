"""Which visual features stay: one small file a policy."""

from trimming.policies.clusters import Clusters
from trimming.policies.divprune import DivPrune
from trimming.policies.elastic import ElasticCache
from trimming.policies.fastv import FastV
from trimming.policies.grid import Grid
from trimming.policies.keep_all import KeepAll
from trimming.policies.policy import KeepShare, Policy, VisualContext
from trimming.policies.random import Random
from trimming.policies.snapkv import SnapKV
from trimming.policies.spread import Spread
from trimming.policies.think import ThinK
from trimming.policies.trimmed_llama import TrimmedLlama
from trimming.policies.visionzip import VisionZip
from trimming.policies.weighted_farthest import WeightedFarthest
from trimming.policies.zipvl import ZipVL

__all__ = [
    "Clusters",
    "DivPrune",
    "ElasticCache",
    "FastV",
    "Grid",
    "KeepAll",
    "KeepShare",
    "Policy",
    "Random",
    "SnapKV",
    "Spread",
    "ThinK",
    "TrimmedLlama",
    "VisionZip",
    "VisualContext",
    "WeightedFarthest",
    "ZipVL",
]
