"""What a method is given: outdated weights on their way, a task and its examples; opened and checked, nothing read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recyclable.carrying.carried import Carried
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task import Task
from recyclable.tasks.parts.task_data import TaskData


@dataclass(frozen=True)
class Scene:
    """A recycling run about to start."""

    carried: Carried
    """weights, old base, new base."""
    data: TaskData
    head: bool
    """Whether the weights' head is one for the task's labels."""
    ds_config: dict[str, Any]

    @property
    def task(self) -> Task:
        """The task."""
        return self.data.task

    @property
    def kind(self) -> TaskKind:
        """The task's kind."""
        return self.data.task.kind
