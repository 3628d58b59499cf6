"""Frozen teachers behind one interface: what a loss gets from them is the same, wherever they have it from.

Shapes: B examples, ... what a kind of task asks of each, N hidden states compared (embedding output and every layer but
the last), H width, C classes, K classes a teacher tells (K = C unless only the likeliest are kept).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

from recyclable.architectures.last_layer import narrow
from recyclable.architectures.pooling import ends_tell, last_places
from recyclable.data.examples import Batch, as_teacher_reads
from recyclable.objectives.task_outputs import task_outputs
from recyclable.tasks.parts.kind import TaskKind, of_text

SIGNAL_PREFIX = "teacher."
"""Marks the entries of a batch that hold a teacher's outputs."""
Told = TypeVar("Told")


@dataclass(frozen=True)
class Signals:
    """What a teacher says of a batch, without gradient."""

    logits: torch.Tensor
    """[B, ..., K]"""
    states: torch.Tensor | None = None
    """Those of one token of each example [B, N, H] (`compared_states`); None where nobody asked for them."""
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
        with_states: tell the hidden states too.
        top_k: tell only so many of the likeliest classes; None tells all.
    """

    def __init__(self, model: nn.Module, kind: TaskKind, with_states: bool = True, top_k: int | None = None) -> None:
        super().__init__(model)
        self.kind, self.with_states, self.top_k = kind, with_states, top_k
        narrow(model)

    @torch.no_grad()
    def signals(self, batch: Batch) -> Signals:
        batch = as_teacher_reads(batch)
        told = task_outputs(self.model, batch, self.with_states)
        states = compared_states(told, batch, self.model.config) if self.with_states else None
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


def compared_states(told: Any, batch: Batch, config: PretrainedConfig) -> torch.Tensor:
    """States of one token of each text [B, N, H] from a model's hidden states [B, L, H], the last layer's left out.

    It is one that sees the whole text: of an encoder the first, of a decoder the last, as its first sees only itself.

    Args:
        told: the model's output with its hidden states.
        config: the model's.
    """
    decoder = getattr(told, "decoder_hidden_states", None)
    hidden = told.hidden_states if decoder is None else decoder
    if decoder is None and (config.is_encoder_decoder or not ends_tell(config)):
        return torch.stack([states_BLH[:, 0] for states_BLH in hidden[:-1]], dim=1)
    mask_BL = batch["attention_mask"]
    rows, last_B = torch.arange(len(mask_BL), device=mask_BL.device), last_places(mask_BL)
    return torch.stack([of_text(states_BLH, batch)[rows, last_B] for states_BLH in hidden[:-1]], dim=1)
