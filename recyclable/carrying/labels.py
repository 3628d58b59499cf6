"""Whether a head that was tuned is one for a task's labels, and the task in the order of its rows."""

from __future__ import annotations

from recyclable.errors import InputError
from recyclable.tasks.parts.task import Task
from recyclable.weights.adapted import AdaptedWeights


def same_labels(weights: AdaptedWeights, task: Task) -> bool:
    """Whether the weights' head is one for this kind of task and labels of these names."""
    theirs = weights.manifest.task
    return sorted(theirs["labels"]) == sorted(task.labels) and theirs["problem"] == task.problem


def in_order(weights: AdaptedWeights, task: Task, hint: str = "") -> Task:
    """The task with its labels in the order of the rows of the weights' head; InputError where these are others."""
    theirs, wanted = weights.manifest.task, list(task.labels)
    if theirs["problem"] != task.problem:
        problem = f"was tuned for {theirs['problem']}, the task {task.name} is {task.problem}"
        raise InputError(weights.folder, problem)
    if not same_labels(weights, task):
        unnamed = theirs.get("labels_from") == "nobody"
        hint += "; nobody has named them: `recyclable store add` does, with --labels" if unnamed else ""
        found = theirs["labels"]
        raise InputError(weights.folder, f"was tuned for labels {found}, the task {task.name} has {wanted}{hint}")
    return task.in_order(tuple(theirs["labels"]))


def require_same_rows(weights: AdaptedWeights, task: Task) -> None:
    """InputError where the weights' head has not the task's labels in the task's order."""
    in_order(weights, task)
    if (found := weights.manifest.task["labels"]) != (wanted := list(task.labels)):
        raise InputError(weights.folder, f"has its labels in the order {found}, the others in {wanted}: no path there")
