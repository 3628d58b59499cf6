"""Which implementation of attention a model computes with, by what model and machine have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from recyclable.architectures.short_attention import write_out
from recyclable.errors import InputError

_FLASH = {"flash_attention_3": (9, 0), "flash_attention_2": (8, 0)}
"""The fastest first -> the oldest compute capability that it runs on (Hopper, Ampere)."""


@dataclass(frozen=True)
class Machine:
    """What decides: an NVIDIA GPU's compute capability, None without one, and the flash-attention installed."""

    capability: tuple[int, int] | None = None
    flash: frozenset[str] = frozenset()


def this_machine() -> Machine:
    """The one this process runs on."""
    if not (torch.cuda.is_available() and torch.version.cuda):
        return Machine()
    installed = {"flash_attention_2": is_flash_attn_2_available(), "flash_attention_3": is_flash_attn_3_available()}
    return Machine(torch.cuda.get_device_capability(), frozenset(name for name, found in installed.items() if found))


def fastest(model: PreTrainedModel, half: bool, machine: Machine) -> str | None:
    """A flash-attention that model and machine have; None: transformers' choice, which is sdpa, or eager without it.

    Args:
        half: attention is computed in bf16 or fp16; flash-attention knows no other.
    """
    if not (half and machine.capability and model._supports_flash_attn):
        return None
    fitting = (name for name, oldest in _FLASH.items() if name in machine.flash and machine.capability >= oldest)
    return next(fitting, None)


def set_attention(model: nn.Module, wanted: str | None, half: bool, machine: Machine) -> None:
    """Have a model compute attention as `wanted`; None: the `fastest`, and written out where that is the fastest
    (`short_attention`). InputError where it cannot be had."""
    write_out(model, few=wanted is None)
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not (name := wanted or fastest(module, half, machine)):
            continue
        if name in _FLASH and name not in machine.flash:  # transformers would fetch it as code from the hub
            problem = "needs its package, a GPU for it, and no documents kept apart in a sequence"
            raise InputError("attn_implementation", f"is {name}, which {problem}: expected sdpa or eager")
        try:
            module.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise InputError("attn_implementation", f"is {name}: {str(error).splitlines()[0]}") from error


def attention_of(model: nn.Module) -> str:
    """What a model computes attention with."""
    found = {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}
    return ", ".join(sorted(filter(None, found)))
