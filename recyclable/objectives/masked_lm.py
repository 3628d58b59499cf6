"""Masked language modelling: cross-entropy at the masked positions, the head computed only there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from recyclable.architectures.heads import LanguageHead, language_head
from recyclable.data.examples import Batch
from recyclable.kernels import LossSettings
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import first_token_states
from recyclable.objectives.vocabulary_loss import VocabularyLoss


class MaskedStates(NamedTuple):
    """A masked language model's view of a batch, just before it spreads over the vocabulary."""

    hidden: torch.Tensor
    """[M, H] at the masked positions."""
    states: torch.Tensor | None
    """First-token states [B, N, H], where asked for."""


def masked_states(head: LanguageHead, batch: Batch, with_states: bool = False) -> MaskedStates:
    """Run a masked LM on `input_ids` and `attention_mask` [B, L], up to its head's layer; `positions` [M] index B*L."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    told = head.body(**inputs, output_hidden_states=with_states)
    states = first_token_states(told.hidden_states) if with_states else None
    every = told["last_hidden_state" if "last_hidden_state" in told else "logits"]
    return MaskedStates(head.transform(every.flatten(0, 1)[batch["positions"]]), states)


class MaskedLM(Objective):
    """Cross-entropy of the tokens that the collator masked (Devlin et al. 2019, section 3.1).

    Batches hold `input_ids`, `attention_mask` [B, L], `positions` [M] (flat indices into B*L) and `targets` [M].
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self._head = language_head(student)
        self.over_vocabulary = VocabularyLoss(self._head, None, LossSettings())
        self.weights = {"mlm": 1.0}

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return self.over_vocabulary.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"mlm": batch["targets"].numel()}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        hidden = masked_states(self._head, batch).hidden
        return {"mlm": self.over_vocabulary(hidden, None, batch["targets"]).loss}
