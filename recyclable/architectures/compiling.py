"""Regional compilation: a model's repeated layers are compiled one by one, and those of one structure share a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from recyclable.architectures.last_layer import is_narrow
from recyclable.architectures.layers import layer_lists
from recyclable.errors import InputError

_GRAPHS = 64
"""Of the layers of a model: each structure's in training and in evaluation, at one shape and then at any, and more."""


def require_compiler() -> None:
    """InputError where there is nothing that turns graphs into programs for this machine."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # 42 MB, and time: for those alone who compile
    from torch.utils._triton import has_triton

    missing = None
    if torch.cuda.is_available():
        missing = None if has_triton() else "Triton is not installed"
    else:
        try:
            get_cpp_compiler()
        except Exception:  # of a class that torch keeps to itself
            missing = "there is no C++ compiler (g++ or clang++, or what CXX names)"
    if missing:
        raise InputError("torch_compile", f"is true, but {missing}: install it, or set it to false")


@contextmanager
def compiled_layers(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """While it lasts, each layer of a model's stacks is compiled when it is first called; names stay as they are.

    The first length or batch size that is new makes graphs for all of them: those that follow take no more time. What
    lies outside the layers (embeddings, heads, losses) is as it was, and so is a last layer that computes only what is
    read (`last_layer.narrow`): how many tokens that is changes with every batch.

    Args:
        backend: torch.compile's.

    Raises InputError where a model has no stack of layers.
    """
    again = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not is_narrow(m)]
    layers = [layer for stack in layer_lists(model).values() for layer in stack if not is_narrow(layer)]
    if not layers:
        raise InputError("torch_compile", f"is true, but {type(model).__name__} has no stack of layers: expected false")
    recomputing: Any = {module: module._gradient_checkpointing_func for module in again}
    compiled = cache(partial(torch.compile, backend=backend))
    for module, recompute in recomputing.items():
        module._gradient_checkpointing_func = partial(_compiled_within, recompute, compiled)
    for layer in layers:
        call = torch.compile(layer._call_impl, backend=backend)  # as `nn.Module.compile` does
        layer._compiled_call_impl = partial(_unless_training, layer, call) if again else call
    try:
        with patch.object(torch._dynamo.config, "recompile_limit", _GRAPHS):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        for module, recompute in recomputing.items():
            module._gradient_checkpointing_func = recompute


def _unless_training(layer: nn.Module, compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """A layer that computes again, compiled in evaluation, where it does not: in training `_compiled_within` is."""
    return (layer._call_impl if layer.training else compiled)(*inputs, **named)


def _compiled_within(recompute: Callable[..., Any], compiled: Callable[..., Any], layer: Any, *inputs: Any) -> Any:
    """A layer that computes again, as transformers calls it (`partial` of its forward), compiled."""
    return recompute(partial(compiled(layer.func), *layer.args, **layer.keywords), *inputs)
