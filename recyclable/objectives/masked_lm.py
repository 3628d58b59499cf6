"""Masked language modelling: cross-entropy at the masked positions, the head computed only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from recyclable.objectives.objective import Batch, Objective
from recyclable.objectives.teachers import first_token_states

_HEADS = ("cls", "lm_head")  # BERT's and RoBERTa's names for a head that takes hidden states


class MaskedStates(NamedTuple):
    """A masked language model's view of a batch, just before it spreads over the vocabulary."""

    hidden: torch.Tensor
    """[M, H] at the masked positions."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Logits [M, V] of `hidden`; a linear layer with its weight [V, H] where the family is known."""
    states: torch.Tensor | None
    """First-token states [B, N, H], where asked for."""


def masked_states(model: nn.Module, batch: Batch, with_states: bool = False) -> MaskedStates:
    """Run a masked LM, plain or with LoRA, on `input_ids` and `attention_mask` [B, L]; `positions` [M] index B*L.

    ZeRO-3 gathers the head's weights when it is called, so `head` must be called in the same wrapped forward.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    head = next((head for name in _HEADS if isinstance(head := getattr(model, name, None), nn.Module)), None)
    run = model if head is None else model.base_model
    told = run(**inputs, output_hidden_states=with_states)
    states = first_token_states(told.hidden_states) if with_states else None
    every = told.logits if head is None else told.last_hidden_state
    hidden, head = _before_vocabulary(head, every.flatten(0, 1)[batch["positions"]])
    return MaskedStates(hidden, head, states)


def _before_vocabulary(head: nn.Module | None, hidden: torch.Tensor) -> tuple[torch.Tensor, Callable]:
    """The head up to its last layer, which spreads over the vocabulary, and that layer."""
    match type(head).__name__:
        case "BertOnlyMLMHead":
            return head.predictions.transform(hidden), head.predictions.decoder
        case "RobertaLMHead" | "XLMRobertaLMHead" | "CamembertLMHead":
            return head.layer_norm(F.gelu(head.dense(hidden))), head.decoder
        case "NoneType":  # other families: the model's own forward gave the logits
            return hidden, nn.Identity()
    return hidden, head


class MaskedLM(Objective):
    """Cross-entropy of the tokens that the collator masked (Devlin et al. 2019, section 3.1).

    Batches hold `input_ids`, `attention_mask` [B, L], `positions` [M] (flat indices into B*L) and `targets` [M].
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.weights = {"mlm": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"mlm": batch["targets"].numel()}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        hidden, head, _ = masked_states(self.student, batch)
        return {"mlm": F.cross_entropy(head(hidden).float(), batch["targets"], reduction="sum")}
