"""Loss and scores of one model on the examples of a task, by this process alone."""

from __future__ import annotations

import numpy as np
from torch import nn

from recyclable.data.examples import TaskExamples
from recyclable.objectives.of_task import task_objective
from recyclable.tasks.parts.task import Task
from recyclable.training.evaluation import predict
from recyclable.weights.team import ALONE

BATCH = 64
"""Examples of a forward pass."""


def measure(model: nn.Module, examples: TaskExamples, task: Task) -> dict[str, float]:
    """`loss`, mean, and the scores of the kind of task.

    Args:
        model: in evaluation mode, with its values, on any device.
    """
    device = next(model.parameters()).device
    predictions = predict(task_objective(model, task.kind), examples, BATCH, device, ALONE)
    return loss_and_scores(predictions, examples.labels.numpy(), task)


def loss_and_scores(predictions: np.ndarray, targets: np.ndarray, task: Task) -> dict[str, float]:
    """`loss` and the scores of predictions [N, ..., C] against targets [N, ...]."""
    scores = task.kind.score(predictions, targets, task.labels)
    return {"loss": task.kind.mean_loss(predictions, targets), **scores}
