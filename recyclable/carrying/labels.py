"""Whether a head that was tuned is one for a task's labels."""

from __future__ import annotations

from recyclable.errors import InputError
from recyclable.tasks.parts.task import Task
from recyclable.weights.adapted import AdaptedWeights


def same_labels(weights: AdaptedWeights, task: Task) -> bool:
    """Whether the weights' head is one for this kind of task and these labels, in this order."""
    theirs = weights.manifest.task
    return theirs["labels"] == list(task.labels) and theirs["problem"] == task.problem


def require_same_labels(weights: AdaptedWeights, task: Task, hint: str = "") -> None:
    """InputError where it is not."""
    theirs, wanted = weights.manifest.task, list(task.labels)
    if theirs["problem"] != task.problem:
        problem = f"was tuned for {theirs['problem']}, the task {task.name} is {task.problem}"
        raise InputError(weights.folder, problem)
    if theirs["labels"] != wanted:
        found = theirs["labels"]
        raise InputError(weights.folder, f"was tuned for labels {found}, the task {task.name} has {wanted}{hint}")
