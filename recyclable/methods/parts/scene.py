"""What a method is given: outdated weights on their way, a task and its examples; opened and checked, nothing read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recyclable.carrying.carried import Carried
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task import Task
from recyclable.tasks.parts.task_data import TaskData

if TYPE_CHECKING:
    from torch import nn


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

    def teacher(self, seed: int, of: Callable[[], Carried] | None = None) -> nn.Module:
        """The old base with the outdated weights on it, unread.

        Args:
            of: opens other weights, on their base.
        """
        from recyclable.models.tasks import outdated_model
        from recyclable.tasks.parts.task import task_of

        opened = self.carried.at_home if of is None else of()
        return outdated_model(opened, task_of(self.carried.weights.manifest.task), seed)

    @property
    def kind(self) -> TaskKind:
        """The task's kind."""
        return self.data.task.kind
