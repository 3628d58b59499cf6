"""Learning a masked language model from the masked tokens and from a frozen teacher's distributions over them.

Soft targets as in Hinton et al. 2015 (arXiv 1503.02531), a patient loss on first-token states as in Sun et al. 2019
(arXiv 1908.09355). With the old base as its teacher, a base forgets less while it is trained on something new (Li &
Hoiem 2016, Learning without Forgetting, arXiv 1606.09282).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from recyclable.architectures.heads import language_head
from recyclable.data.examples import Batch
from recyclable.kernels import LossSettings
from recyclable.objectives.distillation import patient_sum
from recyclable.objectives.masked_lm import MaskedStates, masked_states
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import FrozenModel
from recyclable.objectives.vocabulary_loss import VocabularyLoss


class MaskedLMTeacher(FrozenModel[MaskedStates]):
    """A masked language model as a teacher, on the same tokens with the same masks.

    Args:
        with_states: tell the first-token states too.
    """

    def __init__(self, model: nn.Module, with_states: bool) -> None:
        super().__init__(model)
        self.with_states = with_states
        self.head = language_head(model)

    @torch.no_grad()
    def signals(self, batch: Batch) -> MaskedStates:
        return masked_states(self.head, batch, self.with_states)


class LMDistillation(Objective):
    """L = lm + beta patient with lm = (1 - alpha) mlm + alpha T^2 D(teacher/T, student/T) per masked token.

    D is one of `kernels.LossSettings`, which also says what is meant where a vocabulary is padded to more rows than the
    other. Terms are `lm`, which alone carries a gradient of the two, found with it in one go; its parts `mlm` and `kd`
    (D without T^2), told but not weighted; and `patient`, which needs a teacher that tells states of the student's
    shape and is left out where beta is 0. Batches are those of `MaskedLM`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: MaskedLMTeacher,
        *,
        alpha: float,
        beta: float,
        temperature: float,
        divergence: str = "forward",
        mixing: float = 0.5,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        settings = LossSettings(divergence, mixing, temperature, hard_weight=1.0 - alpha, soft_weight=alpha)
        self._head = language_head(student)
        self.over_vocabulary = VocabularyLoss(self._head, teacher.head, settings)
        self.weights = {"lm": 1.0, "mlm": 0.0, "kd": 0.0}
        if beta:
            self.weights["patient"] = beta

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return self.over_vocabulary.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = batch["targets"].numel()
        return {term: len(batch["input_ids"]) if term == "patient" else tokens for term in self.weights}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        told = self.teacher.signals(batch)
        student = masked_states(self._head, batch, "patient" in self.weights)
        lm = self.over_vocabulary(student.hidden, told.hidden, batch["targets"])
        sums = {"lm": lm.loss, "mlm": lm.hard, "kd": lm.soft}
        if "patient" in self.weights:
            assert student.states is not None and told.states is not None, "a teacher without states"
            sums["patient"] = patient_sum(student.states, told.states)
        return sums
