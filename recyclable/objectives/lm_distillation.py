"""Learning a masked language model from the masked tokens and from a frozen teacher's distributions over them.

Soft targets as in Hinton et al. 2015 (arXiv 1503.02531), a patient loss on first-token states as in Sun et al. 2019
(arXiv 1908.09355). With the old base as its teacher, a base forgets less while it is trained on something new (Li &
Hoiem 2016, Learning without Forgetting, arXiv 1606.09282).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from recyclable.objectives.distillation import kd_sum, patient_sum
from recyclable.objectives.masked_lm import MaskedStates, masked_states
from recyclable.objectives.objective import Batch, Objective
from recyclable.objectives.teachers import FrozenModel


class MaskedLMTeacher(FrozenModel):
    """A masked language model as a teacher, on the same tokens with the same masks.

    Args:
        with_states: tell the first-token states too.
    """

    def __init__(self, model: nn.Module, with_states: bool) -> None:
        super().__init__(model)
        self.with_states = with_states

    @torch.no_grad()
    def signals(self, batch: Batch) -> MaskedStates:
        return masked_states(self.model, batch, self.with_states)


def lm_sums(
    student: MaskedStates, teacher: MaskedStates, targets: torch.Tensor, temperature: float
) -> dict[str, torch.Tensor]:
    """Summed over the masked tokens: cross-entropy of `targets` [M] and KL(teacher/T || student/T), in fp32.

    A vocabulary may be padded to more rows than the other: a token that the teacher lacks has probability zero for it,
    one that the student lacks is left out and the teacher's others are renormalised.
    """
    logits = student.head(student.hidden).float()
    with torch.no_grad():
        told = teacher.head(teacher.hidden).float()[:, : logits.shape[-1]]
    known = torch.arange(told.shape[-1], device=told.device).expand_as(told) if told.shape != logits.shape else None
    return {
        "mlm": F.cross_entropy(logits, targets, reduction="sum"),
        "kd": kd_sum(logits, told, temperature, known),
    }


class LMDistillation(Objective):
    """L = (1 - alpha) mlm + alpha T^2 KL(teacher/T || student/T) + beta patient, the first two per masked token.

    Batches are those of `MaskedLM`. The patient term needs a teacher that tells states of the student's shape; it is
    left out where beta is 0.
    """

    def __init__(
        self, student: nn.Module, teacher: MaskedLMTeacher, *, alpha: float, beta: float, temperature: float
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        self.weights = {"mlm": 1.0 - alpha, "kd": alpha * temperature**2}
        if beta:
            self.weights["patient"] = beta

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = batch["targets"].numel()
        return {term: len(batch["input_ids"]) if term == "patient" else tokens for term in self.weights}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        told = self.teacher.signals(batch)
        student = masked_states(self.student, batch, "patient" in self.weights)
        sums = lm_sums(student, told, batch["targets"], self.temperature)
        if "patient" in self.weights:
            sums["patient"] = patient_sum(student.states, told.states)
        return sums
