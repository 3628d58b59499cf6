"""Cross-entropy of chosen tokens, the head computed only there: language models of all kinds, and tasks whose answers
are text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from recyclable.architectures.heads import LanguageHead, language_head
from recyclable.data.examples import Batch, model_inputs
from recyclable.kernels import LossSettings
from recyclable.objectives.objective import Objective
from recyclable.objectives.token_states import Inputs, rows_of, token_states
from recyclable.objectives.vocabulary_loss import VocabularyLoss

Answers = Callable[[torch.Tensor, Batch], torch.Tensor]
"""What a kind of task makes of each row's [log-likelihood, tokens]."""


class TokenLoss(Objective):
    """Cross-entropy of the tokens that a batch names: masked ones (Devlin et al. 2019, section 3.1), next ones, or
    those of a response.

    Batches hold `input_ids`, `attention_mask` [B, L] (an encoder-decoder's `decoder_input_ids` as well), `positions`
    [M] (flat indices into B x L) and `targets` [M].

    Args:
        term: what the loss is called.
        inputs: what the model is told of a batch.
        answers: what becomes of each row's [log-likelihood, tokens] in predictions; None leaves them as they are.
        logits: as for `LossSettings`.
    """

    def __init__(
        self,
        student: PreTrainedModel | nn.Module,
        term: str = "task",
        inputs: Inputs = model_inputs,
        answers: Answers | None = None,
        logits: str = "fp32",
    ) -> None:
        super().__init__()
        self.student = student
        self._term, self._inputs, self._answers = term, inputs, answers
        self._head = language_head(student)
        self.over_vocabulary = VocabularyLoss(self._head, None, LossSettings(logits=logits))
        self.weights = {term: 1.0}

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return self.over_vocabulary.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self._term: batch["targets"].numel()}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        hidden = token_states(self._head, batch, inputs=self._inputs).hidden
        return {self._term: self.over_vocabulary(hidden, None, batch["targets"]).loss}

    def predict(self, batch: Batch) -> torch.Tensor:
        """The log-likelihood of each row's targets and how many they are [B, 2] (fp32), as the kind of task has it."""
        return likelihoods(self._head, self.over_vocabulary, batch, self._answers, self._inputs)


def likelihoods(
    head: LanguageHead,
    over_vocabulary: VocabularyLoss,
    batch: Batch,
    answers: Answers | None,
    inputs: Inputs = model_inputs,
) -> torch.Tensor:
    """[B, 2]: summed log-likelihood of each row's targets and how many they are; or what `answers` makes of it."""
    hidden = token_states(head, batch, inputs=inputs).hidden
    losses = over_vocabulary(hidden, None, batch["targets"], each=True)
    told = torch.stack([-losses, torch.ones_like(losses)], dim=1)
    found = told.new_zeros(len(batch["input_ids"]), 2).index_add_(0, rows_of(batch), told)
    return found if answers is None else answers(found, batch)
