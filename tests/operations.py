"""A look at each operation of torch that a piece of code runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Calls ``see(operation, arguments, result)`` behind each operation inside of it."""

    def __init__(self, see: Callable[[Any, Sequence[Any], Any], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(func, args, out)
        return out


class Largest(Watch):
    """The most elements that any one operation has made, views left out."""

    def __init__(self) -> None:
        super().__init__(self._note)
        self.elements = 0

    def _note(self, func: Any, args: Sequence[Any], out: Any) -> None:
        if not func.is_view and not func._schema.is_mutable:
            self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
