"""Frozen teachers behind one interface: what a loss gets from them is the same, wherever they have it from.

Shapes: B examples, ... what a kind of task asks of each, N hidden states compared (embedding output and every layer but
the last), H width, C classes, K classes a teacher tells (K = C unless only the likeliest are kept).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from recyclable.data.examples import Batch, model_inputs
from recyclable.tasks.parts.kind import TaskKind

SIGNAL_PREFIX = "teacher."
"""Marks the entries of a batch that hold a teacher's outputs."""
Told = TypeVar("Told")


@dataclass(frozen=True)
class Signals:
    """What a teacher says of a batch, without gradient."""

    logits: torch.Tensor
    """[B, ..., K]"""
    states: torch.Tensor | None = None
    """First-token states [B, N, H]; None where nobody asked for them."""
    classes: torch.Tensor | None = None
    """Which classes the logits are of [B, ..., K] (int64), likeliest first; None: all, in order."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, a row per example: what a cache keeps and a batch carries."""
        found = {"logits": self.logits, "states": self.states, "classes": self.classes}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Teacher(nn.Module, ABC, Generic[Told]):
    """A source of signals; part of the objective, so that ZeRO sees its weights where it has any."""

    @abstractmethod
    def signals(self, batch: Batch) -> Told:
        """What the teacher says of a batch."""


class FrozenModel(Teacher[Told]):
    """A teacher that computes in every step: replicated on each rank, partitioned like the student under ZeRO-3.

    Its weights have neither gradients nor optimizer state, and it stays in evaluation whatever the mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenModel[Told]:
        """The mode is noted; the model stays in evaluation."""
        super().train(mode)
        self.model.eval()
        return self


class OnlineTeacher(FrozenModel[Signals]):
    """A model of a task as a teacher.

    Args:
        with_states: tell the first-token states too.
        top_k: tell only so many of the likeliest classes; None tells all.
    """

    def __init__(self, model: nn.Module, kind: TaskKind, with_states: bool = True, top_k: int | None = None) -> None:
        super().__init__(model)
        self.kind, self.with_states, self.top_k = kind, with_states, top_k

    @torch.no_grad()
    def signals(self, batch: Batch) -> Signals:
        told = self.model(**model_inputs(batch), output_hidden_states=self.with_states)
        states = first_token_states(told.hidden_states) if self.with_states else None
        logits = self.kind.answers(told.logits, batch)
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return Signals(logits, states)
        logits, classes = logits.topk(self.top_k, dim=-1)
        return Signals(logits, states, classes)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The signals by name: an engine passes tensors on."""
        return self.signals(batch).tensors()


class CachedTeacher(Teacher[Signals]):
    """A teacher whose outputs came with the batch (`TaughtExamples`); it has no weights and computes nothing."""

    def signals(self, batch: Batch) -> Signals:
        names = [name for name in batch if name.startswith(SIGNAL_PREFIX)]
        return Signals(**{name.removeprefix(SIGNAL_PREFIX): batch[name] for name in names})


def first_token_states(hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """States of the first token [B, N, H] from a model's hidden states [B, L, H], the last layer's left out."""
    return torch.stack([states_BLH[:, 0] for states_BLH in hidden_states[:-1]], dim=1)
