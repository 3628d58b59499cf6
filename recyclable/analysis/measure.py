"""Loss and scores of one model on the examples of a task, by this process alone."""

from __future__ import annotations

from torch import nn

from recyclable.data.examples import TaskExamples
from recyclable.objectives.of_task import task_objective
from recyclable.tasks.parts.task import Task
from recyclable.training.evaluation import predict
from recyclable.weights.team import ALONE

BATCH = 64
"""Examples of a forward pass."""


def measure(model: nn.Module, examples: TaskExamples, task: Task, error_of: str | None = None) -> dict[str, float]:
    """`loss`, mean, and the scores of the kind of task that need no generated text.

    Args:
        model: in evaluation mode, with its values, on any device.
        error_of: a score whose standard error is told as `error`, where no formula tells it.
    """
    device = next(model.parameters()).device
    predictions = predict(task_objective(model, task.kind), examples, BATCH, device, ALONE)
    targets = examples.labels.numpy()
    found = task.kind.scored(predictions, targets, task.labels)
    error = None if error_of is None else task.kind.sampling_error(error_of, predictions, targets)
    return found if error is None else {**found, "error": error}
