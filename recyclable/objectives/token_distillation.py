"""Learning chosen tokens from the text and from a frozen teacher's distributions over them.

Soft targets as in Hinton et al. 2015 (arXiv 1503.02531), a patient loss on hidden states as in Sun et al. 2019
(arXiv 1908.09355). With the old base as its teacher, a base forgets less while it is trained on something new (Li &
Hoiem 2016, Learning without Forgetting, arXiv 1606.09282); with outdated weights as its teacher a task is recycled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from recyclable.architectures.heads import language_head
from recyclable.data.examples import Batch, model_inputs
from recyclable.kernels import LossSettings
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import FrozenModel
from recyclable.objectives.token_loss import Answers, likelihoods
from recyclable.objectives.token_states import Compared, Inputs, TokenStates, token_states
from recyclable.objectives.vocabulary_loss import VocabularyLoss


class TokenTeacher(FrozenModel[TokenStates]):
    """A language model as a teacher, on the same tokens.

    Args:
        compared: tell these tokens' states too.
        inputs: what the model is told of a batch.
    """

    def __init__(self, model: nn.Module, compared: Compared | None, inputs: Inputs = model_inputs) -> None:
        super().__init__(model)
        self.compared, self._inputs = compared, inputs
        self.head = language_head(model)

    @torch.no_grad()
    def signals(self, batch: Batch) -> TokenStates:
        return token_states(self.head, batch, self.compared, self._inputs)


class TokenDistillation(Objective):
    """L = lm + beta patient with lm = (1 - alpha) hard + alpha T^2 D(teacher/T, student/T) per predicted token.

    D is one of `kernels.LossSettings`, which also says what is meant where a vocabulary is padded to more rows than the
    other. Terms are `lm`, which alone carries a gradient of the two, found with it in one go; its parts, the hard one
    by its name and `kd` (D without T^2), told but not weighted; and `patient`, which needs a teacher that tells states
    of the student's shape and is left out where beta is 0. Batches are those of `TokenLoss`.

    Args:
        logits: as for `LossSettings`.
        term: what the hard part is called.
        inputs: what the student is told of a batch.
        answers: as for `TokenLoss`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TokenTeacher,
        *,
        alpha: float,
        beta: float,
        temperature: float,
        divergence: str = "forward",
        mixing: float = 0.5,
        logits: str = "fp32",
        term: str = "task",
        inputs: Inputs = model_inputs,
        answers: Answers | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        settings = LossSettings(
            divergence, mixing, temperature, hard_weight=1.0 - alpha, soft_weight=alpha, logits=logits
        )
        self._term, self._inputs, self._answers = term, inputs, answers
        self._head = language_head(student)
        self.over_vocabulary = VocabularyLoss(self._head, teacher.head, settings)
        self.weights = {"lm": 1.0, term: 0.0, "kd": 0.0}
        if beta:
            self.weights["patient"] = beta

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return self.over_vocabulary.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens, compared = batch["targets"].numel(), self.teacher.compared
        rows = 0 if compared is None else compared.count(batch)
        return {term: rows if term == "patient" else tokens for term in self.weights}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        told = self.teacher.signals(batch)
        compared = self.teacher.compared if "patient" in self.weights else None
        student = token_states(self._head, batch, compared, self._inputs)
        lm = self.over_vocabulary(student.hidden, told.hidden, batch["targets"])
        sums = {"lm": lm.loss, self._term: lm.hard, "kd": lm.soft}
        if compared is not None:
            assert student.states is not None and told.states is not None, "a teacher without states"
            sums["patient"] = compared.patient_sum(student.states, told.states, batch)
        return sums

    def predict(self, batch: Batch) -> torch.Tensor:
        """As `TokenLoss.predict`."""
        return likelihoods(self._head, self.over_vocabulary, batch, self._answers, self._inputs)
