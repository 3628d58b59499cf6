"""Learning from labels and a frozen teacher: distilled logits and the patient loss on hidden states.

Distillation-based recycling of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 5.2); the
patient loss follows Sun et al. 2019 (arXiv 1908.09355).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from recyclable.architectures.last_layer import narrow
from recyclable.data.examples import Batch
from recyclable.objectives.objective import Objective
from recyclable.objectives.task_outputs import task_outputs
from recyclable.objectives.teachers import Signals, Teacher, compared_states
from recyclable.ranges import LOSS, phase
from recyclable.tasks.parts.kind import TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def patient_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of half the squared distance of states [B, N, H], mean over N and H, in fp32."""
    return 0.5 * (student.float() - teacher.float()).square().mean((1, 2)).sum()


def kd_sum(kind: TaskKind, student: torch.Tensor, told: Signals, temperature: float, batch: Batch) -> torch.Tensor:
    """Sum of the kind's divergence of a student's answers [B, ..., C] from a teacher's, over all rows of the batch."""
    classes = None if told.classes is None else kind.rows(told.classes, batch)
    return kind.divergence_sum(kind.rows(student, batch), kind.rows(told.logits, batch), temperature, classes)


class Distillation(Objective):
    """L = (1 - alpha) task + alpha T^2 KL(teacher/T || student/T) + beta patient.

    In regression, which has no distribution to distil, the middle term is alpha/2 (teacher - student)^2.

    Args:
        beta: 0 leaves hidden states alone: nobody computes them.
        reduction: `batchmean` divides KL by rows (examples, or words), `paper` by rows x classes as the released code.
        same_labels: False leaves the KL term out, for a teacher with other labels.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        kind: TaskKind,
        teacher: Teacher[Signals],
        *,
        alpha: float,
        beta: float,
        temperature: float,
        reduction: str = "batchmean",
        same_labels: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.kind, self.teacher = student, kind, teacher
        self.temperature = temperature
        narrow(student)
        self.weights = {"task": 1.0 - alpha}
        if beta:
            self.weights["patient"] = beta
        if same_labels:
            self.weights["kd"] = alpha * temperature**2
        self._kd_terms = student.config.num_labels if reduction == "paper" else 1

    def counts(self, batch: Batch) -> dict[str, int]:
        rows = self.kind.count(batch)
        each = {"task": rows, "patient": len(batch["labels"]), "kd": rows * self._kd_terms}
        return {term: each[term] for term in self.weights}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        told = self.teacher.signals(batch)
        student = task_outputs(self.student, batch, states="patient" in self.weights)
        with phase(LOSS):
            return self._compared(student, told, batch)

    def _compared(self, student: Any, told: Signals, batch: Batch) -> dict[str, torch.Tensor]:
        answers = self.kind.answers(student.logits, batch)
        sums = {"task": self.kind.loss_sum(self.kind.rows(answers, batch), self.kind.targets(batch))}
        if "patient" in self.weights:
            assert told.states is not None, "a teacher without states"
            sums["patient"] = patient_sum(compared_states(student, batch, self.student.config), told.states)
        if "kd" in self.weights:
            sums["kd"] = kd_sum(self.kind, answers, told, self.temperature, batch)
        return sums

    def predict(self, batch: Batch) -> torch.Tensor:
        """What the student says of each example [B, ..., C]."""
        return self.kind.answers(task_outputs(self.student, batch).logits, batch)
