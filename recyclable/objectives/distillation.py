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


def kd_sum(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over the batch of KL(teacher/T || student/T), logits [B, C], computed in fp32.

    The softmax of a single output (C = 1, regression) is always 1 and its KL always 0: there it is half the squared
    distance of student/T and teacher/T, the KL of two Gaussians of unit variance, so that T^2 cancels.
    """
    if student.shape[-1] == 1:
        return 0.5 * ((student.float() - teacher.float()) / temperature).square().sum()
    student_log = F.log_softmax(student.float() / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)


def patient_sum(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Sum over the batch of half the squared distance of first-token states, mean over layers and width, in fp32.

    Args:
        student, teacher: hidden states [B, L, H], embedding output first; the last layer is left out.
    """
    distance = torch.zeros((), device=student[0].device)
    for s_BLH, t_BLH in zip(student[:-1], teacher[:-1], strict=True):
        distance = distance + (s_BLH[:, 0].float() - t_BLH[:, 0].float()).square().mean(-1).sum()
    return 0.5 * distance / (len(student) - 1)


class Distillation(Objective):
    """L = (1 - alpha) task + alpha T^2 KL(teacher/T || student/T) + beta patient.

    In regression, which has no distribution to distil, the middle term is alpha/2 (teacher - student)^2.

    Args:
        reduction: `batchmean` divides KL by examples, `paper` by examples x classes as the released code does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float,
        beta: float,
        temperature: float,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.temperature = temperature
        self.weights = {"task": 1.0 - alpha, "kd": alpha * temperature**2, "patient": beta}
        self._kd_terms = student.config.num_labels if reduction == "paper" else 1

    def train(self, mode: bool = True) -> Distillation:
        """Training mode for the student; the teacher stays in evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    def counts(self, batch: Batch) -> dict[str, int]:
        examples = len(batch["labels"])
        return {"task": examples, "kd": examples * self._kd_terms, "patient": examples}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        inputs = model_inputs(batch)
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True)
        student = self.student(**inputs, output_hidden_states=True)
        return {
            "task": task_sum(student.logits, batch["labels"]),
            "kd": kd_sum(student.logits, teacher.logits, self.temperature),
            "patient": patient_sum(student.hidden_states, teacher.hidden_states),
        }

    def predict(self, batch: Batch) -> torch.Tensor:
        """The student's logits [B, C]."""
        return self.student(**model_inputs(batch)).logits
