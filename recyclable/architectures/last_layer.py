"""A model's last layer, computed behind its attention only at the tokens whose states are read.

Nobody looks at the other tokens' last states: their keys and values are needed, but no projection of what they attended
to, no feed-forward. As NarrowBERT's (Li et al. 2023, arXiv 2301.04761), but in the last layer alone, where it is exact.

The layer's own forward runs, once, and calls the same modules in the same order, so that ZeRO-3 gathers the same
parameters on all ranks whatever each of them reads. It is given the read tokens' states; the way into the attention
gets all tokens' instead (`WayThrough.entry`), and the attention's last projection only the read ones' again (`end`).

Shapes: B rows, L their length, of which the last T are the batch's own (prompts stand before them), M read tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recyclable.architectures.family import family_of
from recyclable.architectures.layers import layer_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 0.5
"""Share of the tokens up to which leaving out the others pays for moving the read ones about."""


@dataclass
class _Read:
    """What is read of the forward pass under way; layers that compute again in the backward pass find it again."""

    positions: torch.Tensor | None
    """[M], flat indices into B x T; None: the first of each row, prompts included."""
    length: int = 0
    """T"""
    states: torch.Tensor = field(init=False)
    """All tokens', as they come into the layer [B, L, H]."""
    rows: torch.Tensor = field(init=False)
    """[M], flat indices into B x L."""

    def begin(self, states_BLH: torch.Tensor) -> torch.Tensor:
        """The read tokens' states of all that come into the layer."""
        rows, length, _ = states_BLH.shape
        self.states = states_BLH
        if self.positions is None:
            self.rows = torch.arange(0, rows * length, length, device=states_BLH.device)
        else:
            before = length - self.length  # each row has so many more, in front
            self.rows = self.positions + (self.positions // self.length + 1) * before
        return self.only(states_BLH)

    def only(self, values: torch.Tensor) -> torch.Tensor:
        """[M, 1, ...] of [B, L, ...]: as rows, so that what is a row's own stays so where each has one read token."""
        return values.flatten(0, 1).index_select(0, self.rows)[:, None]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] of [M, 1, ...]; 0 where nobody reads."""
        shape = self.states.shape[:2]
        everywhere = values.new_zeros(shape.numel(), *values.shape[2:])
        return everywhere.index_copy(0, self.rows, values[:, 0]).unflatten(0, shape)


_read: ContextVar[_Read | None] = ContextVar("read", default=None)


@contextmanager
def read_only(positions: torch.Tensor, rows: int, length: int) -> Iterator[None]:
    """While it lasts, of the last states of a model that is `narrowed` only these are right; the others may be 0.

    Args:
        positions: [M], each once, flat indices into `rows` x `length`. Where they are most of all, all are computed.
    """
    few = len(positions) <= _MOST * rows * length
    with _reading(_Read(positions, length) if few else None):
        yield


@contextmanager
def read_by_head(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, of the last states of a `narrowed` model only those are right that its own head reads: of a
    sequence classifier of a family whose classifiers read the first token that one, of all others all."""
    bare = _bare(model)
    first = family_of(bare.config).classifies_first and type(bare).__name__.endswith("ForSequenceClassification")
    with _reading(_Read(None) if first else None):
        yield


@contextmanager
def _reading(read: _Read | None) -> Iterator[None]:
    token = _read.set(read)
    try:
        yield
    finally:
        _read.reset(token)


def narrow(model: PreTrainedModel) -> None:
    """Have a model's last layer compute what `read_only` and `read_by_head` ask for, where its family is known.

    Twice is once. Adapters are attached before.
    """
    model = _bare(model)
    way, stacks = family_of(model.config).way_through, list(layer_lists(model).values())
    # transformers takes a layer's input for the embeddings' output where there is one layer; chunks are of lengths
    if way is None or len(stacks) != 1 or len(stacks[0]) < 2 or getattr(model.config, "chunk_size_feed_forward", None):
        return
    layer = stacks[0][-1]
    if _enter in layer._forward_pre_hooks.values():
        return
    modules = dict(layer.named_modules())
    entry = next(modules[name] for name in way.entry if name in modules)
    # before ZeRO-3's hooks, which watch for the gradients of what a module is given
    layer.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
    entry.register_forward_pre_hook(_widen, prepend=True, with_kwargs=True)
    modules[way.end].register_forward_pre_hook(_gather, prepend=True)
    layer.register_forward_hook(_leave, prepend=True)


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """Without an adapter's shell."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named inputs of a module."""


def _enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    read = _read.get()
    return None if read is None else _with(args, kwargs, read.begin(args[0] if args else kwargs["hidden_states"]))


def _widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    read = _read.get()
    return None if read is None else _with(args, kwargs, read.states)


def _gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    read = _read.get()
    return None if read is None else (read.only(args[0]), *args[1:])


def _leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    if (read := _read.get()) is None:
        return output
    return (read.spread(output[0]), *output[1:]) if isinstance(output, tuple) else read.spread(output)


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], states: torch.Tensor) -> Given:
    """The same inputs with other states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
