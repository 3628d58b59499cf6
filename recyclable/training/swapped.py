"""Masters and moments that ZeRO-3 keeps on NVMe, or whose parameters it keeps there: read and written group by group.

DeepSpeed's own checkpoints do not bring them back: they copy the optimizer's files without its step, and leave the
parameters that a model computes with as the run began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recyclable import distributed

_MASTER = "master"


def is_swapped(optimizer: Any) -> bool:
    """Whether a ZeRO optimizer has states or parameters on NVMe."""
    return bool(getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False))


def save_states(optimizer: Any, folder: Path) -> None:
    """Write what this rank keeps, a file per group."""
    for number in range(len(optimizer.fp16_groups)):
        with _at_hand(optimizer, number) as master:
            kept = {_MASTER: master.data, **optimizer.optimizer.state[master]}
            save_file({name: tensor.cpu().contiguous() for name, tensor in kept.items()}, _file(folder, number))


def load_states(optimizer: Any, folder: Path) -> None:
    """Go on from what `save_states` wrote: masters, moments, and the parameters that the model computes with."""
    optimizer._partition_all_parameters()
    for number in range(len(optimizer.fp16_groups)):
        found = load_file(_file(folder, number))
        with _at_hand(optimizer, number, changed=True) as master:
            master.data.copy_(found.pop(_MASTER))
            where = {name: "cpu" if name == "step" else master.device for name in found}  # as torch's AdamW has it
            optimizer.optimizer.state[master] = {name: tensor.to(where[name]) for name, tensor in found.items()}
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def own_masters(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """(parameter, its flat range in this rank's fp32 copy, good until the next one is asked for)."""
    for number, group in enumerate(optimizer.fp16_groups):
        with _at_hand(optimizer, number) as master:
            start = 0
            for parameter in group:
                yield parameter, master.data[start : start + parameter.ds_tensor.ds_numel]
                start += parameter.ds_tensor.ds_numel


@contextmanager
def _at_hand(optimizer: Any, number: int, changed: bool = False) -> Iterator[nn.Parameter]:
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


def _file(folder: Path, number: int) -> Path:
    return folder / f"states-rank-{distributed.rank():05d}-group-{number:05d}.safetensors"
