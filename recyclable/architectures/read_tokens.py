"""At which tokens the last states of a forward pass are read, said by who reads them to the layer that makes them.

Shapes: B rows, L their length, of which the last T are the batch's own (prompts stand before them), M read tokens, Q
the most of any row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from recyclable.architectures.family import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 0.5
"""Share of the tokens up to which leaving out the others pays for moving the read ones about."""


class Padded(NamedTuple):
    """Read tokens row by row, each row filled up with any of its tokens."""

    tokens: torch.Tensor
    """[B, Q], flat indices into B x L."""
    places: torch.Tensor
    """Of each read token [M], flat indices into B x Q."""


@dataclass
class ReadTokens:
    """What is read of the forward pass under way; layers that compute again in the backward pass find it again."""

    positions: torch.Tensor | None
    """[M], flat indices into B x T; None: the first of each row, prompts included."""
    length: int = 0
    """T"""
    attending: bool = False
    """Whether the attention of the layer that is read is at work."""
    states: torch.Tensor = field(init=False)
    """All tokens', as they come into the layer [B, L, H]."""
    rows: torch.Tensor = field(init=False)
    """[M], flat indices into B x L."""
    padded: Padded | None = field(init=False)
    """None where it would not pay, or only values tell Q and looking at them means waiting."""

    def begin(self, states_BLH: torch.Tensor) -> torch.Tensor:
        """The read tokens' states of all that come into the layer."""
        rows, length, _ = states_BLH.shape
        self.states = states_BLH
        if self.positions is None:
            self.rows = torch.arange(0, rows * length, length, device=states_BLH.device)
            self.padded = Padded(self.rows[:, None], torch.arange(rows, device=states_BLH.device))
        else:
            before = length - self.length  # each row has so many more, in front
            self.rows = self.positions + (self.positions // self.length + 1) * before
            seen = states_BLH.device.type == "cpu" and not isinstance(states_BLH, FakeTensor)
            self.padded = _padded(self.rows, rows, length) if seen else None
        return self.only(states_BLH)

    def let_go(self) -> None:
        """Keep no graph, only values: the graph's own layers that compute again hold the context in which this is."""
        if "states" in vars(self):
            self.states = self.states.detach().requires_grad_(self.states.requires_grad)

    def only(self, values: torch.Tensor) -> torch.Tensor:
        """[M, 1, ...] of [B, L, ...]: as rows, so that what is a row's own stays so where each has one read token."""
        return values.flatten(0, 1).index_select(0, self.rows)[:, None]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] of [M, 1, ...]; 0 where nobody reads."""
        shape = self.states.shape[:2]
        everywhere = values.new_zeros(shape.numel(), *values.shape[2:])
        return everywhere.index_copy(0, self.rows, values[:, 0]).unflatten(0, shape)


def _padded(tokens: torch.Tensor, rows: int, length: int) -> Padded | None:
    row = tokens // length
    counts = torch.bincount(row, minlength=rows)
    most = int(counts.max())
    if not 0 < most <= _MOST * length:
        return None
    order = row.argsort(stable=True)
    before = counts.cumsum(0) - counts
    places = torch.empty_like(row)
    places[order] = row[order] * most + torch.arange(len(row)) - before[row[order]]
    filled = torch.arange(0, rows * length, length).repeat_interleave(most)
    return Padded(filled.index_copy(0, places, tokens).view(rows, most), places)


_now: ContextVar[ReadTokens | None] = ContextVar("read tokens", default=None)


def read_tokens() -> ReadTokens | None:
    """Those of the forward pass under way; None: all are read."""
    return _now.get()


@contextmanager
def read_only(positions: torch.Tensor, rows: int, length: int) -> Iterator[None]:
    """While it lasts, of the last states of a model whose last layer is narrow only these are right, others may be 0.

    Args:
        positions: [M], each once, flat indices into `rows` x `length`. Where they are most of all, all are computed.
    """
    few = len(positions) <= _MOST * rows * length
    with _reading(ReadTokens(positions, length) if few else None):
        yield


@contextmanager
def read_by_head(model: PreTrainedModel) -> Iterator[None]:
    """The same for what a model's own head reads: a sequence classifier of a family whose classifiers read the first
    token reads that, all others read all."""
    bare = without_shell(model)
    family, classifies = (
        family_of(getattr(bare, "config", None)),
        type(bare).__name__.endswith("SequenceClassification"),
    )
    first = family.classifies_first and classifies
    with _reading(ReadTokens(None) if first else None):
        yield


@contextmanager
def _reading(read: ReadTokens | None) -> Iterator[None]:
    token = _now.set(read)
    try:
        yield
    finally:
        _now.reset(token)
        if read is not None:
            read.let_go()


def without_shell(model: PreTrainedModel) -> PreTrainedModel:
    """A model as transformers has it, adapters on its modules and all, without what PEFT has put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
