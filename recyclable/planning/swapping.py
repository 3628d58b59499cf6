"""Host memory that ZeRO-3 takes for what it keeps on NVMe: buffers on the way, and what stays in memory all the same.

Read from DeepSpeed 0.19.8's `runtime/swap_tensor/partitioned_param_swapper.py`, `optimizer_utils.py` and
`runtime/zero/stage3.py`. Buffers are pinned, and so there from the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

BUFFER = 100_000_000
"""Elements of one of the buffers of parameters, of itself."""
_LEAST = 1 << 20
"""Bytes of a rank's part of a tensor; smaller ones stay in memory."""


@dataclass(frozen=True)
class Swapping:
    """The settings of a ds_config that it depends on, DeepSpeed's defaults filled in; counts are in elements."""

    buffers: int
    """Of parameters, all of them together."""
    in_memory: int
    """So much of the trained parameters is in host memory for good."""
    state_buffers: int
    """How many buffers there are of the optimizer's states; each takes the largest sub-group."""

    @classmethod
    def of(cls, zero: dict[str, Any]) -> Swapping:
        """Read a ds_config's `zero_optimization`."""
        parameters, optimizer = (zero.get(f"offload_{of}") or {} for of in ("param", "optimizer"))
        return cls(
            buffers=int(parameters.get("buffer_count", 5)) * int(parameters.get("buffer_size", BUFFER)),
            in_memory=int(parameters.get("max_in_cpu", 1e9)),
            state_buffers=int(optimizer.get("buffer_count", 4)),
        )

    def of_parameters(self, trained: Iterable[int], other: Iterable[int], size: int, sub_group: int) -> Counter[str]:
        """Part -> bytes of one rank that has its parameters on NVMe.

        Args:
            trained, other: elements of its parts of tensors.
            size: bytes of an element.
            sub_group: elements of the largest of the optimizer's sub-groups.
        """
        trained = list(trained)
        own, kept = sum(trained), min(sum(trained), self.in_memory)
        small = sum(n for n in (*trained, *other) if n * size < _LEAST)
        written = sub_group if kept < own else 0  # a sub-group's new weights on their way back
        return Counter(weights=size * (kept + small), buckets=size * (self.buffers + written))

    def of_states(self, size: int, sub_group: int) -> Counter[str]:
        """The same of one that has its optimizer's states there."""
        return Counter(buckets=size * self.state_buffers * sub_group)


def largest_sub_group(groups: Iterable[Iterable[int]], least: int) -> int:
    """Elements of the largest sub-group: DeepSpeed closes one as soon as it has so many.

    Args:
        groups: elements of a rank's parts of tensors, by the optimizer's groups.
    """
    largest = 0
    for group in groups:
        filled = 0
        for n in group:
            filled += n
            largest = max(largest, filled)
            if filled >= least:
                filled = 0
    return largest
