"""How much of the accelerator's arithmetic a run uses: model FLOPs per token over the device's peak."""

from __future__ import annotations

import torch
from torch import nn

from recyclable.planning.devices import by_torch_name


def flops_per_token(objective: nn.Module, passes: int = 1) -> float:
    """Model FLOPs of one training step per token, by parameters outside embeddings (Kaplan et al. 2020, section 2.1).

    A trained parameter costs 2 in the forward pass and 4 in the backward, a frozen one of the student 2 and 2 (the
    gradient only passes through), the teacher's 2.

    Args:
        passes: forward and backward passes of the student per token; the teacher has one.
    """
    embedding = {id(p) for m in objective.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    total = 0.0
    for name, parameter in objective.named_parameters():
        if id(parameter) not in embedding:
            size = getattr(parameter, "ds_numel", parameter.numel())
            cost = passes * (6 if parameter.requires_grad else 4) if name.startswith("student.") else 2
            total += cost * size
    return total


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this rank's device, None for a CPU or an unknown accelerator."""
    if not torch.cuda.is_available():
        return None
    known = by_torch_name(torch.cuda.get_device_name())
    return None if known is None else known.flops
