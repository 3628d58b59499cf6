"""One adapter of a stack: its settings, how far it has come, and what checkpoints call its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from recyclable.config.settings import LearnSettings
from recyclable.data.order import Order
from recyclable.tasks.parts.task_data import TaskData
from recyclable.training.checkpoint.record import Progress
from recyclable.training.early_stopping import stopped
from recyclable.training.teaching import grouping

Tensors = dict[str, torch.Tensor]


@dataclass
class StackedRun:
    """One adapter of a stack, and how far it has come."""

    name: str
    settings: LearnSettings
    data: TaskData
    model: nn.Module
    """Whose trainable parameters are the adapter's."""
    progress: Progress = field(default_factory=Progress)
    best: Tensors = field(default_factory=dict)
    """The adapter at the best step, by the model's names; fp32."""
    final: dict[str, float] = field(default_factory=dict)
    """What the best weights score on test."""
    problem: str | None = None
    """Why it was given up."""

    @property
    def trained(self) -> Tensors:
        """The adapter."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def live(self) -> bool:
        """Whether it is still to be trained."""
        return self.problem is None and not self.done

    @property
    def done(self) -> bool:
        """Whether it has taken all its steps, or has stopped early."""
        ends = self.progress.step >= self.settings.max_steps
        return ends or stopped(self.progress.history, self.settings, self.data.metric)

    def due(self, step: int) -> bool:
        """Whether it is to be scored after a step."""
        ends = step == self.settings.max_steps
        now = self.problem is None and self.progress.step == step
        return now and (ends or step % self.settings.evaluation_interval() == 0)

    def order(self) -> Order:
        """Which examples make up which step."""
        lengths = grouping(self.data.train, self.settings)
        return Order(len(self.data.train), self.settings.train_batch_size, self.settings.seed, lengths)

    def copied(self) -> Tensors:
        """The adapter as it is now; fp32, in host memory."""
        return {name: tensor.detach().float().cpu().clone() for name, tensor in self.trained.items()}

    def now(self, name: str) -> str:
        """What checkpoints call a tensor of the adapter."""
        return f"{self.name}/now/{name}"

    def at_best(self, name: str) -> str:
        """The same at the best step."""
        return f"{self.name}/best/{name}"


def layout(runs: Sequence[StackedRun]) -> dict[str, list[int]]:
    """Name -> shape of all that a checkpoint of a stack has."""
    places = [(run, name, tensor) for run in runs for name, tensor in run.trained.items()]
    return {called: list(tensor.shape) for run, name, tensor in places for called in (run.now(name), run.at_best(name))}
