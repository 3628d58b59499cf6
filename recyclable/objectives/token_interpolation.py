"""Interpolation distillation of models that answer in text: `objectives.interpolation` over the vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from recyclable.architectures.heads import language_head
from recyclable.data.examples import Batch
from recyclable.kernels import LossSettings
from recyclable.objectives.interpolation import AlongPath, Places
from recyclable.objectives.token_distillation import TokenTeacher
from recyclable.objectives.token_loss import Answers, likelihoods
from recyclable.objectives.token_states import TokenStates, token_states
from recyclable.objectives.vocabulary_loss import VocabularyLoss


class TokenInterpolation(AlongPath):
    """The loss of `Interpolation` per predicted token.

    At x = 1 the terms are those of `TokenDistillation`, at the points below `kd_1`, `patient_1` ... Points have a fused
    loss of their own, in which the last layer's weights are mixed as in that layer's forward, which is not called.

    Args:
        logits: as for `LossSettings`.
        answers: as for `TokenLoss`; the others as for `Interpolation`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TokenTeacher,
        *,
        places: Places,
        share: float,
        alphas: Sequence[float],
        betas: Sequence[float],
        temperature: float,
        second: nn.Module | None = None,
        left_out: Collection[nn.Module] = (),
        logits: str = "fp32",
        answers: Answers | None = None,
    ) -> None:
        head, soft = language_head(student), [(1.0 - share) * alpha for alpha in alphas]
        own = LossSettings(temperature=temperature, hard_weight=share, soft_weight=soft[-1], logits=logits)
        below = LossSettings(temperature=temperature, hard_weight=0.0, soft_weight=1.0, logits=logits)
        at_points = VocabularyLoss(head, teacher.head, below)
        users: dict[nn.Module, nn.Module] = {at_points: head.layer} if head.is_linear else {}
        super().__init__(student, teacher, places=places, second=second, left_out=left_out, users=users)
        self._head, self._states, self._answers, self._scale = head, teacher.compared, answers, temperature**2
        self.over_vocabulary, self.at_points = VocabularyLoss(head, teacher.head, own), at_points
        kd = self.weighted("kd", [weight * self._scale for weight in soft])
        self.weights = {"lm": 1.0, "task": 0.0, **kd, "kd": 0.0}
        if self._states is not None:
            self.weights |= self.weighted("patient", [(1.0 - share) * beta for beta in betas])

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        yield from super().borrowed()
        yield from self.over_vocabulary.borrowed()
        yield from self.at_points.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens, rows = batch["targets"].numel(), 0 if self._states is None else self._states.count(batch)
        return {term: rows if term.startswith("patient") else tokens for term in self.weights}

    def compared(self, batch: Batch, told: TokenStates, own: bool) -> dict[str, torch.Tensor]:
        states, targets = self._states, batch["targets"]
        student = token_states(self._head, batch, states)
        if own:
            lm = self.over_vocabulary(student.hidden, told.hidden, targets)
            found = {"lm": lm.loss, "task": lm.hard, "kd": lm.soft}
        else:
            found = {"kd": self.at_points(student.hidden, told.hidden, targets).loss / self._scale}
        if states is not None:
            assert student.states is not None and told.states is not None, "a teacher without states"
            found["patient"] = states.patient_sum(student.states, told.states, batch)
        return found

    def predict(self, batch: Batch) -> torch.Tensor:
        """As `TokenLoss.predict`."""
        return likelihoods(self._head, self.over_vocabulary, batch, self._answers)
