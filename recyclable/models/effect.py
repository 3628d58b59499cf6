"""Whether an adapter does anything: of a fresh one of its kind, what is not drawn at random must have moved."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from recyclable.carrying.places import adapter_parameters, saved_tensors
from recyclable.errors import InputError
from recyclable.models.adapters import attach_peft
from recyclable.models.build import start_all
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.sources import Unread


def require_effect(folder: Path, file: Ranged, planned: PreTrainedModel, base: Base) -> None:
    """InputError when an adapter changes no output: no numbers, or all that training moves first is where it began.

    A fresh adapter leaves its model's outputs alone by tensors of fixed values (zeros, ones, copies of the base's),
    beside which others are drawn. No gradient reaches the drawn ones as long as the fixed ones have not moved. Kinds
    without any fixed tensor (prompts) do something from the start.

    Args:
        folder: where the adapter's config lies.
        file: its tensors, which fit the model.
        planned: the model's structure, on the meta device; it is used up.
        base: what the model's values come from.
    """
    if not any(file.stored(name).numel for name in file.names):
        raise InputError(folder, "holds no numbers: an adapter without effect (saved without gathering its shards?)")
    start_all(planned, base, seed=0)
    one, other = (_fresh(copy.deepcopy(planned), folder, file, seed) for seed in (0, 1))
    fixed: list[str] = []
    for name in [n for n in file.names if one[n].requires_grad]:
        tensor = _values(one[name])
        if torch.equal(tensor, _values(other[name])):
            fixed.append(name)
            if not torch.equal(tensor.to(file.stored(name).dtype), file[name]):
                return
    if fixed:
        raise InputError(folder, f"changes no output: {fixed[0]} and its like are as in a fresh adapter")


def _fresh(model: PreTrainedModel, folder: Path, file: Ranged, seed: int) -> dict[str, torch.Tensor]:
    attached = attach_peft(model, folder, "fresh", seed)
    return {**saved_tensors(attached), **adapter_parameters(attached, file.names)}


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.read(0, tensor.numel()).view(tensor.shape) if isinstance(tensor, Unread) else tensor.detach()
