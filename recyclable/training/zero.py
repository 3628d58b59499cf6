"""The only file that knows how ZeRO lays out parameters: full values out of an engine, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def trainable_shapes(module: nn.Module) -> Shapes:
    """Name -> (fp32, full shape) of the trainable parameters, whether partitioned or not."""
    return {name: (torch.float32, _full_shape(p)) for name, p in module.named_parameters() if p.requires_grad}


def trainable_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full fp32 value on the CPU) of the trainable parameters; a collective: every rank must run through it.

    Under mixed precision the value is the optimizer's fp32 master copy, not the rounded one that the model computes
    with. At most one whole tensor is in memory.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            if full is None:  # plain fp32 without ZeRO: every rank holds the parameter itself
                full = parameter
            yield name, full.detach().float().cpu().view(_full_shape(parameter))


def load_trainable(module: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Put values (full, by name) into the trainable parameters that the model computes with; a collective.

    The optimizer's master copies stay as they are, so this is for evaluating, not for training on.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(read(name))


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
