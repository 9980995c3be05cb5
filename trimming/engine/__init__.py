"""A batch engine for Mllama: each image encoded once, prompts packed, sequences in slots that never wait for each other."""

from trimming.engine.request import Completion, Image, KeptSets, Request, groups
from trimming.engine.sampling import Sampling
from trimming.engine.scheduler import Engine, Statistics

__all__ = ["Completion", "Engine", "Image", "KeptSets", "Request", "Sampling", "Statistics", "groups"]
