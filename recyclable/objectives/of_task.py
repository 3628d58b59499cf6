"""The objective of a kind of task: over its classes, or over the vocabulary where its answers are text."""

from __future__ import annotations

from torch import nn

from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Objective
from recyclable.objectives.token_loss import TokenLoss
from recyclable.tasks.parts.kind import TaskKind


def task_objective(student: nn.Module, kind: TaskKind) -> Objective:
    """Learning a task from its labels alone."""
    return TokenLoss(student, answers=kind.answers) if kind.over_vocabulary else LabelledTask(student, kind)
