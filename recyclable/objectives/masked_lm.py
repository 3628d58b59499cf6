"""Masked language modelling: cross-entropy at the masked positions, the head computed only there."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from recyclable.objectives.objective import Batch, Objective

_HEADS = ("cls", "lm_head")  # BERT's and RoBERTa's names for a head that takes hidden states


class MaskedLM(Objective):
    """Cross-entropy of the tokens that the collator masked (Devlin et al. 2019, section 3.1).

    Batches hold `input_ids`, `attention_mask` [B, L], `positions` [M] (flat indices into B*L) and `targets` [M].
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.weights = {"mlm": 1.0}
        self._head = next((name for name in _HEADS if isinstance(getattr(student, name, None), nn.Module)), None)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"mlm": batch["targets"].numel()}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        logits = self._masked_logits(batch)
        return {"mlm": F.cross_entropy(logits.float(), batch["targets"], reduction="sum")}

    def _masked_logits(self, batch: Batch) -> torch.Tensor:
        """Logits [M, V]."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if self._head is None:  # other families: all positions through the model's own forward
            return self.student(**inputs).logits.flatten(0, 1)[batch["positions"]]
        hidden = self.student.base_model(**inputs).last_hidden_state.flatten(0, 1)
        return getattr(self.student, self._head)(hidden[batch["positions"]])
