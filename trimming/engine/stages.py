"""Where the language model's layers are: on one device, or in runs of consecutive layers on several.

Of a model on several devices the vision tower, the projector, the embeddings and the rotary tables are with the first layers,
the last norm and the head with the last ones. Hidden states go from run to run: one device works at a time, so this is for
models that one device can't hold (the 90B in bf16 is 177 GB), not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import MllamaForConditionalGeneration

from trimming.costs import Geometry
from trimming.engine.layers import crosses


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers of the language model on one device."""

    device: torch.device
    layers: range

    def geometry(self, whole: Geometry, is_cross: list[bool]) -> Geometry:
        """Sizes of the stage's part of the cache. ``is_cross`` is ``crosses(model)``."""
        cross = sum(is_cross[layer] for layer in self.layers)
        return replace(whole, self_layers=len(self.layers) - cross, cross_layers=cross)


def stages(model: MllamaForConditionalGeneration) -> list[Stage]:
    """One for each device, in the layers' order.

    Raises ``ValueError`` where the layers of a device are not consecutive, a layer is in two places, or the rest of the model
    is not where the engine needs it.
    """
    inner: Any = model.model
    text = inner.language_model
    homes = [_home(layer, f"layer {number}") for number, layer in enumerate(text.layers)]
    begins = [n for n, home in enumerate(homes) if n == 0 or home != homes[n - 1]]
    found = [Stage(homes[a], range(a, b)) for a, b in zip(begins, [*begins[1:], len(homes)], strict=True)]
    if len({stage.device for stage in found}) != len(found):
        raise ValueError(f"the layers of a device must be consecutive, and are on {', '.join(map(str, homes))}")
    first, last = homes[0], homes[-1]
    wanted = {
        "vision_model": (inner.vision_model, first),
        "multi_modal_projector": (inner.multi_modal_projector, first),
        "embed_tokens": (text.embed_tokens, first),
        "norm": (text.norm, last),
        "lm_head": (model.lm_head, last),
    }
    for name, (module, device) in wanted.items():
        if (home := _home(module, name)) != device:
            raise ValueError(f"{name} is on {home}, and has to be on {device}, beside the layers it works with")
    return found


def is_sharded(model: MllamaForConditionalGeneration) -> bool:
    """Whether the model lies on several devices."""
    return len(stages(model)) > 1


def stage_geometries(model: MllamaForConditionalGeneration) -> list[Geometry]:
    """Each stage's part of the cache, in order."""
    whole, is_cross = Geometry.of(model.config), crosses(model)
    return [stage.geometry(whole, is_cross) for stage in stages(model)]


def _home(module: Any, name: str) -> torch.device:
    homes = {parameter.device for parameter in module.parameters()}
    if len(homes) != 1:
        raise ValueError(f"{name} is on {len(homes)} devices: {', '.join(sorted(map(str, homes)))}")
    (home,) = homes
    return home
