"""A language model's states where it predicts a token: what losses over the vocabulary and their teachers start from.

Shapes: B rows of a batch, L their length, M predicted tokens, P states that a patient loss compares, N layers of them,
H width. Of an encoder-decoder rows and lengths are the decoder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from recyclable.architectures.heads import LanguageHead
from recyclable.architectures.read_tokens import read_only
from recyclable.data.examples import Batch, model_inputs

Inputs = Callable[[Batch], dict[str, Any]]
"""What a model's forward is told of a batch; the way in which packed documents are kept apart is in it."""


class TokenStates(NamedTuple):
    """A language model's view of a batch, just before it spreads over the vocabulary."""

    hidden: torch.Tensor
    """[M, H] at the predicting tokens."""
    states: torch.Tensor | None
    """[P, N, H], embedding output included, last layer left out; where asked for."""


class Compared:
    """Which tokens' states a patient loss compares; each row of the batch weighs the same, whatever it has of them.

    Args:
        first: the first token of each row, which in an encoder sees all others; else the predicting tokens, since a
            decoder's first token sees only itself.
    """

    def __init__(self, first: bool) -> None:
        self.first = first

    def rows(self, batch: Batch) -> torch.Tensor:
        """The row of each compared token [P]."""
        if self.first:
            return torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
        return rows_of(batch)

    def count(self, batch: Batch) -> int:
        """How many rows have any."""
        return len(self.rows(batch).unique())

    def states(self, hidden_states: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
        """[P, N, H] of hidden states [B, L, H]."""
        if self.first:
            return torch.stack([states_BLH[:, 0] for states_BLH in hidden_states[:-1]], dim=1)
        return torch.stack([states_BLH.flatten(0, 1)[batch["positions"]] for states_BLH in hidden_states[:-1]], dim=1)

    def patient_sum(self, student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum over rows of half the squared distance of states [P, N, H], mean over a row's tokens, N and H; fp32."""
        each = 0.5 * (student.float() - teacher.float()).square().mean((1, 2))
        if self.first:
            return each.sum()
        rows = self.rows(batch)
        # as bincount, whose shape depends on values, so that a plan can follow it
        tokens = rows.new_zeros(len(batch["input_ids"])).index_add_(0, rows, torch.ones_like(rows)).clamp(min=1)
        return (each / tokens[rows]).sum()


def rows_of(batch: Batch) -> torch.Tensor:
    """The row of each predicted token [M]."""
    return batch["positions"] // _told(batch).shape[1]


def _told(batch: Batch) -> torch.Tensor:
    """The ids of the side that predicts [B, L]."""
    return batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]


def token_states(
    head: LanguageHead,
    batch: Batch,
    compared: Compared | None = None,
    inputs: Inputs = model_inputs,
    narrowed: bool = True,
) -> TokenStates:
    """Run a language model up to its head's layer, its last layer where tokens are predicted alone.

    Args:
        batch: `input_ids`, `attention_mask` [B, L], of an encoder-decoder `decoder_input_ids` as well; `positions` [M],
            flat indices into B x L, each once.
        compared: tell these tokens' states of the layers too.
        narrowed: else all of the last layer, for a model whose modules look at how many rows they are given.
    """
    reading = read_only(batch["positions"], *_told(batch).shape) if narrowed else nullcontext()
    with reading:
        told = head.body(**inputs(batch), **without_cache(head.body), output_hidden_states=compared is not None)
    states = None if compared is None else compared.states(told.hidden_states, batch)
    every = told["last_hidden_state" if "last_hidden_state" in told else "logits"]
    return TokenStates(head.transform(every.flatten(0, 1)[batch["positions"]]), states)


def without_cache(body: nn.Module) -> dict[str, bool]:
    """What keeps a model from making a cache of keys and values: packed documents would see each other in some."""
    return {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
