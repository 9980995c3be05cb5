"""Which device holds which part of a model that one device can't hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import MllamaForConditionalGeneration

FIRST = (
    "model.vision_model",
    "model.multi_modal_projector",
    "model.language_model.embed_tokens",
    "model.language_model.rotary_emb",
)
"""What goes with the first layers, as ``trimming.engine.stages`` wants it."""
LAST = ("model.language_model.norm", "lm_head")
LAYER = "model.language_model.layers.{}"


def device_map(model: MllamaForConditionalGeneration, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """A device for each module, for ``from_pretrained``: consecutive layers on each, so that the fullest device's weights are
    as few as can be. Raises ``ValueError`` for more devices than layers.
    """

    def elements(name: str) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())

    layers = model.config.text_config.num_hidden_layers
    if len(devices) > layers:
        raise ValueError(f"gpus_per_actor={len(devices)} is over the model's {layers} layers; lower it")
    sizes = [elements(LAYER.format(number)) for number in range(layers)]
    ends = split(sizes, sum(map(elements, FIRST)), sum(map(elements, LAST)), len(devices))
    found: dict[str, torch.device] = dict.fromkeys(FIRST, devices[0]) | dict.fromkeys(LAST, devices[-1])
    for device, (begin, end) in zip(devices, pairwise([0, *ends]), strict=True):
        found |= {LAYER.format(number): device for number in range(begin, end)}
    return found


def split(sizes: Sequence[int], before: int, after: int, parts: int) -> list[int]:
    """Where each of ``parts`` runs of ``sizes`` ends, none empty, so that the largest sum is least; ``before`` counts into the
    first run, ``after`` into the last."""
    sums = [before]
    for size in sizes:
        sums.append(sums[-1] + size)
    sums[0] = 0
    sums[-1] += after

    @cache
    def best(begin: int, left: int) -> tuple[int, tuple[int, ...]]:
        if left == 1:
            return sums[-1] - sums[begin], (len(sizes),)
        found = []
        for end in range(begin + 1, len(sizes) - left + 2):
            most, ends = best(end, left - 1)
            found.append((max(sums[end] - sums[begin], most), (end, *ends)))
        return min(found)

    return list(best(0, parts)[1])
