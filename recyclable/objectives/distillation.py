"""Learning from labels and a frozen teacher: distilled logits and the patient loss on first-token states.

Distillation-based recycling of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 5.2); the
patient loss follows Sun et al. 2019 (arXiv 1908.09355).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from recyclable.objectives.labelled import model_inputs, task_sum
from recyclable.objectives.objective import Batch, Objective
from recyclable.objectives.teachers import Teacher, first_token_states


def kd_sum(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over the batch of KL(teacher/T || student/T), logits [B, C] and [B, K], computed in fp32.

    The softmax of a single output (C = 1, regression) is always 1 and its KL always 0: there it is half the squared
    distance of student/T and teacher/T, the KL of two Gaussians of unit variance, so that T^2 cancels.

    Args:
        classes: the classes that the teacher's logits are of [B, K]; all others have probability zero.
    """
    if student.shape[-1] == 1:
        return 0.5 * ((student.float() - teacher.float()) / temperature).square().sum()
    student_log = F.log_softmax(student.float() / temperature, dim=-1)
    if classes is not None:
        student_log = student_log.gather(-1, classes)
    teacher_log = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)


def patient_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of half the squared distance of first-token states [B, N, H], mean over N and H, in fp32."""
    return 0.5 * (student.float() - teacher.float()).square().mean((1, 2)).sum()


class Distillation(Objective):
    """L = (1 - alpha) task + alpha T^2 KL(teacher/T || student/T) + beta patient.

    In regression, which has no distribution to distil, the middle term is alpha/2 (teacher - student)^2.

    Args:
        reduction: `batchmean` divides KL by examples, `paper` by examples x classes as the released code does.
        logits: False leaves the KL term out, for a teacher with other labels.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        alpha: float,
        beta: float,
        temperature: float,
        reduction: str = "batchmean",
        logits: bool = True,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        self.weights = {"task": 1.0 - alpha, "patient": beta}
        if logits:
            self.weights["kd"] = alpha * temperature**2
        self._kd_terms = student.config.num_labels if reduction == "paper" else 1

    def counts(self, batch: Batch) -> dict[str, int]:
        examples = len(batch["labels"])
        return {term: examples * (self._kd_terms if term == "kd" else 1) for term in self.weights}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        told = self.teacher.signals(batch)
        student = self.student(**model_inputs(batch), output_hidden_states=True)
        sums = {
            "task": task_sum(student.logits, batch["labels"]),
            "patient": patient_sum(first_token_states(student.hidden_states), told.states),
        }
        if "kd" in self.weights:
            sums["kd"] = kd_sum(student.logits, told.logits, self.temperature, told.classes)
        return sums

    def predict(self, batch: Batch) -> torch.Tensor:
        """The student's logits [B, C]."""
        return self.student(**model_inputs(batch)).logits
