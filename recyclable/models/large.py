"""Parameters that no machine could hold, as fused experts may be, are made on the meta device at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LARGE = 1 << 28
"""Elements; buffers, which stay as they are made, are far smaller."""
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}


class LargeOnMeta(TorchFunctionMode):
    """While it lasts, large tensors have no values; accelerate takes a parameter's away after it has been made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function does it."""
        kwargs = kwargs or {}
        if func in _MAKERS and kwargs.get("device") is None and _elements(*args, **kwargs) >= _LARGE:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _elements(*shape: Any, size: Any = None, **_: Any) -> int:
    """Of a shape in each way that torch takes one."""
    if size is not None:
        return math.prod(size)
    return math.prod(shape[0] if shape and isinstance(shape[0], Sequence) else shape)  # a torch.Size is a tuple
