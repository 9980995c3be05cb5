"""Which visual features stay: one small file a policy."""

from trimming.policies.grid import Grid
from trimming.policies.keep_all import KeepAll
from trimming.policies.policy import Policy, VisualContext
from trimming.policies.random import Random
from trimming.policies.trimmed_llama import TrimmedLlama

__all__ = ["Grid", "KeepAll", "Policy", "Random", "TrimmedLlama", "VisualContext"]
