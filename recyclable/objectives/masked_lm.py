"""Masked language modelling: cross-entropy at the masked positions, the head computed only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from recyclable.kernels import LossSettings
from recyclable.objectives.objective import Batch, Objective
from recyclable.objectives.teachers import first_token_states
from recyclable.objectives.vocabulary_loss import VocabularyLoss

_HEADS = ("cls", "lm_head")  # BERT's and RoBERTa's names for a head that takes hidden states


class _Parts(NamedTuple):
    """A masked language model in the order in which it computes."""

    body: nn.Module
    """Takes tokens, gives what `transform` takes."""
    transform: Callable[[torch.Tensor], torch.Tensor]
    last: nn.Module
    """Spreads hidden states over the vocabulary; gives logits."""


def _parts(model: nn.Module) -> _Parts:
    """The parts of a masked LM, plain or with LoRA; of an unknown family the last does nothing or is the whole head."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    head = next((head for name in _HEADS if isinstance(head := getattr(model, name, None), nn.Module)), None)
    match type(head).__name__:
        case "BertOnlyMLMHead":
            return _Parts(model.base_model, head.predictions.transform, head.predictions.decoder)
        case "RobertaLMHead" | "XLMRobertaLMHead" | "CamembertLMHead":
            return _Parts(model.base_model, lambda x: head.layer_norm(F.gelu(head.dense(x))), head.decoder)
        case "NoneType":  # the model's own forward gives the logits
            return _Parts(model, nn.Identity(), nn.Identity())
    return _Parts(model.base_model, nn.Identity(), head)


def last_layer(model: nn.Module) -> nn.Module:
    """The layer that makes logits of `masked_states`; a linear one with its weight [V, H] where the family is known."""
    return _parts(model).last


class MaskedStates(NamedTuple):
    """A masked language model's view of a batch, just before it spreads over the vocabulary."""

    hidden: torch.Tensor
    """[M, H] at the masked positions."""
    states: torch.Tensor | None
    """First-token states [B, N, H], where asked for."""


def masked_states(model: nn.Module, batch: Batch, with_states: bool = False) -> MaskedStates:
    """Run a masked LM on `input_ids` and `attention_mask` [B, L], up to `last_layer`; `positions` [M] index B*L."""
    body, transform, _ = _parts(model)
    told = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=with_states)
    states = first_token_states(told.hidden_states) if with_states else None
    every = told["last_hidden_state" if "last_hidden_state" in told else "logits"]
    return MaskedStates(transform(every.flatten(0, 1)[batch["positions"]]), states)


class MaskedLM(Objective):
    """Cross-entropy of the tokens that the collator masked (Devlin et al. 2019, section 3.1).

    Batches hold `input_ids`, `attention_mask` [B, L], `positions` [M] (flat indices into B*L) and `targets` [M].
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.over_vocabulary = VocabularyLoss(last_layer(student), None, LossSettings())
        self.weights = {"mlm": 1.0}

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return self.over_vocabulary.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"mlm": batch["targets"].numel()}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        hidden = masked_states(self.student, batch).hidden
        return {"mlm": self.over_vocabulary(hidden, None, batch["targets"]).loss}
