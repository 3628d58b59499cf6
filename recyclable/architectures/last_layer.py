"""A model's last layer, computed only at the tokens whose states are read, but for their keys and values.

Nobody looks at the other tokens' last states: their keys and values are needed, but no queries of theirs, no projection
of what they would attend to, no feed-forward. As NarrowBERT's (Li et al. 2023, arXiv 2301.04761), but in the last layer
alone, where it is exact.

The layer's own forward runs, once, and calls the same modules in the same order, so that ZeRO-3 gathers the same
parameters on all ranks whatever each of them reads. It is given the read tokens' states; the way into the attention
gets all tokens' instead (`WayThrough.entry`), and the attention's last projection only the read ones' again (`end`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recyclable.architectures import last_attention
from recyclable.architectures.family import family_of
from recyclable.architectures.layers import layer_lists
from recyclable.architectures.read_tokens import read_tokens, without_shell

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def narrow(model: PreTrainedModel) -> None:
    """Have a model's last layer compute only what is read (`read_tokens`), where its family is known.

    Twice is once. Adapters are attached before.
    """
    model = without_shell(model)
    if (way := family_of(getattr(model, "config", None)).way_through) is None:
        return
    stacks = list(layer_lists(model).values())
    # transformers takes a layer's input for the embeddings' output where there is one layer
    if len(stacks) != 1 or len(stacks[0]) < 2 or is_narrow(layer := stacks[0][-1]):
        return
    modules = dict(layer.named_modules())
    entry = next(modules[name] for name in way.entry if name in modules)
    # before ZeRO-3's hooks, which watch for the gradients of what a module is given
    layer.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
    entry.register_forward_pre_hook(_widen, prepend=True, with_kwargs=True)
    modules[way.end].register_forward_pre_hook(_narrow_again, prepend=True)
    layer.register_forward_hook(_leave, prepend=True)
    if way.query is not None:
        modules[way.query].register_forward_pre_hook(_gather, prepend=True)
        modules[way.query].register_forward_hook(_spread, prepend=True)
    attention = (way.query or way.end).rpartition(".")[0]
    last_attention.narrow(modules[attention])


def is_narrow(layer: nn.Module) -> bool:
    """Whether a layer computes only what is read: its shapes change with every batch."""
    return _enter in layer._forward_pre_hooks.values()


Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named inputs of a module."""


def _enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    read = read_tokens()
    return None if read is None else _with(args, kwargs, read.begin(args[0] if args else kwargs["hidden_states"]))


def _widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    if (read := read_tokens()) is None:
        return None
    read.attending = True
    return _with(args, kwargs, read.states)


def _narrow_again(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if (read := read_tokens()) is None:
        return None
    read.attending = False
    return read.only(args[0]), *args[1:]


def _leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    if (read := read_tokens()) is None:
        return None
    return (read.spread(output[0]), *output[1:]) if isinstance(output, tuple) else read.spread(output)


def _gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    read = read_tokens()
    return None if read is None else (read.only(args[0]), *args[1:])


def _spread(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    read = read_tokens()
    return None if read is None else read.spread(output)


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], states: torch.Tensor) -> Given:
    """The same inputs with other states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
