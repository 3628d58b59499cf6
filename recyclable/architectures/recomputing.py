"""Gradient checkpointing: a layer keeps its input alone, and computes again in the backward pass what it needs there.

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from recyclable.errors import InputError

_depth = 0  # of layers that are at work and will compute again


def recompute_layers(model: nn.Module, on_host: bool = False) -> None:
    """Have every layer of a model compute again in training; in evaluation nothing changes. Twice is once.

    Dropout draws the same again, autocast is as it was, and inputs that need no gradient (frozen embeddings under an
    adapter) are no obstacle.

    Args:
        model: transformers' or PEFT's.
        on_host: keep the layers' inputs in host memory (pinned, where there is an accelerator). On a CPU they lie
            there anyway, and are not copied.

    Raises InputError where the family, or the way it is tuned, cannot.
    """
    found = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    roots = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not found or not all(root.supports_gradient_checkpointing for root in roots[:1]):
        kind = type(roots[0] if roots else model).__name__
        raise InputError(
            "gradient_checkpointing", f"is on, but transformers has no such thing for {kind}: expected off"
        )
    if _has_prefix(model):
        raise InputError("gradient_checkpointing", "is on, but would drop the keys of tuning prefix: expected off")
    for module in found:
        module._gradient_checkpointing_func = partial(_recomputed, on_host)  # type: ignore[assignment]
        module.gradient_checkpointing = True  # type: ignore[assignment]


def is_recomputed() -> bool:
    """Whether what runs now is part of a layer that computes again: what its backward pass needs is not kept."""
    return _depth > 0


def _recomputed(on_host: bool, layer: Callable[..., Any], *inputs: Any) -> Any:
    """As transformers calls it: a layer of its positional inputs, the others bound already."""
    layer = partial(copy_context().run, layer)  # what was so around it the first time is so again
    again = partial(checkpoint, layer, *inputs, use_reentrant=False, context_fn=lambda: (_noted(), _noted()))
    if not on_host:
        return again()
    with save_on_cpu(pin_memory=torch.accelerator.is_available()):  # of what checkpoint itself saves: the inputs
        return again()


@contextmanager
def _noted() -> Iterator[None]:
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def _has_prefix(model: nn.Module) -> bool:
    """Whether keys and values of a trained prefix stand before each layer's."""
    return str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).endswith("PREFIX_TUNING")
