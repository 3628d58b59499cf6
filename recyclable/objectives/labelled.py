"""Learning a task from its labels alone."""

from __future__ import annotations

import torch
from torch import nn

from recyclable.architectures.last_layer import narrow
from recyclable.data.examples import Batch
from recyclable.objectives.objective import Objective
from recyclable.objectives.task_outputs import task_outputs
from recyclable.ranges import LOSS, phase
from recyclable.tasks.parts.kind import TaskKind


class LabelledTask(Objective):
    """The loss of a kind of task; batches hold the tokenizer's outputs [B, L] and `labels` [B, ...]."""

    def __init__(self, student: nn.Module, kind: TaskKind) -> None:
        super().__init__()
        self.student, self.kind = student, kind
        narrow(student)
        self.weights = {"task": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"task": self.kind.count(batch)}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        return self.sums_of(task_outputs(self.student, batch).logits, batch)

    def sums_of(self, logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The same, from a student's logits."""
        with phase(LOSS):
            rows = self.kind.rows(self.kind.answers(logits, batch), batch)
            return {"task": self.kind.loss_sum(rows, self.kind.targets(batch))}

    def predict(self, batch: Batch) -> torch.Tensor:
        """What the student says of each example [B, ..., C]."""
        return self.kind.answers(task_outputs(self.student, batch).logits, batch)
