"""Whether a head that was tuned is one for a task's labels, and the task in the order of its rows.

Answers in text are told by a language-model head, which is the same one for every kind of task that has them.
"""

from __future__ import annotations

from recyclable.errors import InputError
from recyclable.tasks import KINDS
from recyclable.tasks.parts.task import Task
from recyclable.weights.adapted import AdaptedWeights


def same_labels(weights: AdaptedWeights, task: Task) -> bool:
    """Whether the weights' head is one for this kind of task and labels of these names."""
    return sorted(weights.manifest.task["labels"]) == sorted(task.labels) and _same_head(weights, task)


def _same_head(weights: AdaptedWeights, task: Task) -> bool:
    theirs = weights.manifest.task["problem"]
    if theirs == task.problem:
        return True
    return task.kind.over_vocabulary and theirs in KINDS.names() and KINDS.get(theirs).over_vocabulary


def in_order(weights: AdaptedWeights, task: Task, hint: str = "") -> Task:
    """The task with its labels in the order of the rows of the weights' head; InputError where these are others."""
    theirs, wanted = weights.manifest.task, list(task.labels)
    if not _same_head(weights, task):
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
