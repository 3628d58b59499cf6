"""The matrix products of a training step: counted as they are computed, and timed alone at the same shapes."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
Product = tuple[int, int, int, int, torch.dtype]
"""Of so many pairs of matrices [m, k] and [k, n], in a precision."""


class Products(TorchDispatchMode):
    """While it lasts, counts this thread's matrix products; attention's as the products that it cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet in (_ATEN.mm, _ATEN.bmm):
            self._count(args[0], args[1])
        elif packet in (_ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.baddbmm_):
            self._count(args[1], args[2])
        elif packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:
            self._attention(args[0], args[1], backward=False)
        elif packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
            self._attention(args[1], args[2], backward=True)
        return func(*args, **(kwargs or {}))

    def _count(self, one: torch.Tensor, other: torch.Tensor) -> None:
        batch = one.shape[0] if one.dim() == 3 else 1
        self.counted[batch, one.shape[-2], one.shape[-1], other.shape[-1], one.dtype] += 1

    def _attention(self, query: torch.Tensor, key: torch.Tensor, backward: bool) -> None:
        """Scores and their sum over values; in the backward pass the gradients of both sides of each."""
        batch, heads, long, wide = query.shape
        other, times = key.shape[-2], 2 if backward else 1
        self.counted[batch * heads, long, wide, other, query.dtype] += times
        self.counted[batch * heads, long, other, wide, query.dtype] += times

    @property
    def flops(self) -> int:
        """A multiplication and an addition as two."""
        return sum(2 * b * m * k * n * times for (b, m, k, n, _), times in self.counted.items())

    def seconds(self) -> float:
        """What they take on this machine one after the other with nothing between, by the quicker of two tries."""
        return sum(times * _alone(product) for product, times in self.counted.items())


@torch.no_grad()
def _alone(product: Product) -> float:
    batch, m, k, n, dtype = product
    one, other = torch.randn(batch, m, k).to(dtype), torch.randn(batch, k, n).to(dtype)
    if batch == 1:
        one, other = one[0], other[0]
    out, took = one @ other, []
    for _ in range(2):
        begin = time.perf_counter()
        torch.matmul(one, other, out=out)
        took.append(time.perf_counter() - begin)
    return min(took)
