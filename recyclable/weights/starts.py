"""Where weights start: outdated weights carried onto a new base, as pure functions on tensors.

Initialization-based recycling of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 5.1):
theta_{i+1} + D_i for full fine-tuning, the old adapter on M_{i+1} otherwise. A tensor the base has travels as a
difference and is added; a tensor it lacks (classifier, fresh pooler) is copied verbatim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch

from recyclable.errors import InputError


class Tensors(Protocol):
    """Canonical name -> tensor; `weights.base.Base` is one."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


def add(base: torch.Tensor, delta: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """base + scale * delta of one shape; the sum in fp32, rounded once to the base's dtype."""
    return torch.add(base.float(), delta.float(), alpha=scale).to(base.dtype)


def subtract(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """tuned - base in fp32."""
    return tuned.float() - base.float()


def outdated_delta(
    new: Tensors, delta: Iterable[tuple[str, torch.Tensor]], head: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a fully tuned model on the new base: new + delta for what the base has, the head verbatim."""
    for name, difference in delta:
        if name not in new:
            raise InputError(name, "is in the delta but not in the new base")
        base = new[name]
        if base.shape != difference.shape:
            raise InputError(name, f"has shape {tuple(base.shape)} in the base, {tuple(difference.shape)} in the delta")
        yield name, add(base, difference)
    yield from head


def outdated_adapter(
    old: Tensors, new: Tensors, adapter: Mapping[str, torch.Tensor], base_name_of: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """An adapter's weights on the new base.

    `modules_to_save` hold full values: where they belong to the base (layer norms), what the upgrade changed is
    added; the adapter's own tensors and the head go over verbatim.

    Args:
        adapter: PEFT name -> tensor.
        base_name_of: PEFT name -> canonical name it would have in the base.
    """
    return {
        name: add(new[base_name], subtract(tensor, old[base_name]))
        if (base_name := base_name_of[name]) in old and base_name in new
        else tensor
        for name, tensor in adapter.items()
    }
