"""Linear layers through oneDNN, their weights in its own layout.

torch multiplies fp32 matrices on a CPU with MKL, which on processors other than Intel's makes do with AVX2. With oneDNN, which
torch brings too and multiplies bf16 with anyway, a decode step of the benchmark's model took half the time on an AMD EPYC.
"""

from __future__ import annotations

import copy
import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class OneDnnLinear(nn.Linear):
    """What a linear layer becomes. It computes with ``layout``, so that later changes of its weight may have no effect."""

    layout: Tensor

    def forward(self, states: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.layout, self.bias, "none", [], "")
        return product


def through_onednn(module: Module) -> Module:
    """``module`` with oneDNN for its linear layers, for inference: a shadow that shares its parameters, or itself where that is
    for nothing: on other devices, in other dtypes, in a build of torch without oneDNN.

    Weights are copied into oneDNN's layout (a sixth of the gain) as long as half of the free memory holds the copies.
    """
    parameters = list(module.parameters())
    plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
    if not plain or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return module
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _shadow(module, 2 * sum(p.nbytes for p in parameters) <= free)


def _shadow(module: Module, packed: bool) -> Module:
    shadow: Any = copy.copy(module)
    if type(shadow) is nn.Linear:
        weight = shadow.weight.detach()
        shadow.__class__ = OneDnnLinear
        shadow.layout = torch.ops.mkldnn._reorder_linear_weight(weight) if packed else weight
    children = module._modules.items()
    shadow._modules = {name: None if child is None else _shadow(child, packed) for name, child in children}
    return shadow
