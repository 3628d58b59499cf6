"""Masters and moments that ZeRO-3 keeps on NVMe, or whose parameters it keeps there: in memory group by group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_swapped(optimizer: Any) -> bool:
    """Whether a ZeRO optimizer has states or parameters on NVMe."""
    return bool(getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False))


def own_masters(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """(parameter, its flat range in this rank's fp32 copy, good until the next one is asked for)."""
    for number, group in enumerate(optimizer.fp16_groups):
        with at_hand(optimizer, number) as master:
            start = 0
            for parameter in group:
                yield parameter, master.data[start : start + parameter.ds_tensor.ds_numel]
                start += parameter.ds_tensor.ds_numel


@contextmanager
def at_hand(optimizer: Any, number: int, changed: bool = False) -> Iterator[nn.Parameter]:
    """The fp32 copy of a group, in memory with its moments while this lasts."""
    swapped = optimizer._swappable_optimizer_subgroup(number)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield optimizer.fp32_partitioned_groups_flat[number]
    finally:
        if swapped and changed:
            optimizer._optimizer_states_and_gradient_swap_out(number)
        elif swapped:
            optimizer._release_swap_buffers(number)
