"""Devices that only pretend: a machine without a GPU still tells whether a model on several devices mixes them up.

A ``Placed`` tensor says that it is on ``meta:0``, ``meta:1`` and so on, computes on the CPU, and refuses to meet a tensor of
another device, as CUDA's do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from trimming.engine import Engine


def pretended(index: int) -> torch.device:
    return torch.device("meta", index)


class Placed(Tensor):
    """``inner``, a CPU tensor, as a tensor of ``device``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner} on {self.device}"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _check(func, (args, kwargs))
        home = kwargs.pop("device", None) or next(t.device for t in tree_iter((args, kwargs)) if isinstance(t, Placed))
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func._schema.is_mutable and func._schema.arguments[0].alias_info is not None:
            return args[0]
        return tree_map(lambda t: _placed(t, home), out)


class Pretending(TorchFunctionMode):
    """Context in which new tensors and copies can be had on pretended devices."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in _MADE and (device := torch.device(kwargs.get("device") or "cpu")).type == "meta":
            return Placed(func(*args, **{**kwargs, "device": "cpu"}), device)
        if name == "to" and not isinstance(args[0], Placed) and len(args) > 1 and getattr(args[1], "type", "") == "meta":
            return Placed(args[0].clone(), args[1])
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Placed) and isinstance(args[1], list):
            args = (args[0], Placed(torch.tensor(args[1]), args[0].device), *args[2:])
        if name == "__setitem__" and isinstance(args[0], Placed) and not isinstance(args[2], Tensor):
            # A plain number would be made a tensor of the meta device, which holds none.
            with torch._C.DisableTorchFunctionSubclass():
                args[0].inner[tree_map(_inner, args[1])] = args[2]
            return None
        if func in _MAKES_MORE and isinstance(args[0], Placed):
            _check(func, (args, kwargs))
            return Placed(func(*tree_map(_inner, args), **tree_map(_inner, kwargs)), args[0].device)
        if name == "tolist" and isinstance(args[0], Placed):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


# Functions that make themselves masks or numbers, which a tensor of the meta device could not hold.
_MAKES_MORE = {F.scaled_dot_product_attention, F.cosine_similarity, torch.where}
_MADE = {torch.tensor, torch.arange, torch.eye, torch.zeros, torch.ones, torch.empty, torch.full}


def use_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets engines run on them: tensors that wrap others can't be had as views in inference mode."""
    monkeypatch.setattr(Engine, "step", torch.no_grad()(inspect.unwrap(Engine.step)))


def place(module: nn.Module, device: torch.device) -> None:
    """Puts the module's parameters and buffers on ``device``."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Placed(_inner(parameter).detach(), device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Placed(_inner(buffer), device)


def _check(func: Any, given: Any) -> None:
    # A number, as a tensor without dimensions, may come from anywhere.
    homes = {t.device for t in tree_iter(given) if isinstance(t, Tensor) and t.dim()}
    if len(homes) > 1:
        raise RuntimeError(f"{func} meets tensors on {', '.join(sorted(map(str, homes)))}")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Placed) else value


def _placed(value: Any, home: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value if torch.device(home).type == "cpu" else Placed(value, torch.device(home))
