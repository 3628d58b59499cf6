"""Finds how packed documents are kept apart in a base's model, by trying on that model; else packing is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recyclable.architectures.heads import language_head
from recyclable.data.examples import Batch
from recyclable.errors import InputError
from recyclable.objectives.apart import Apart, apart
from recyclable.objectives.token_states import without_cache
from recyclable.training.engine import frozen, in_fp32
from recyclable.training.evaluation import to_device


class _Body(nn.Module):
    """A language model up to its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.__dict__["_body"] = language_head(model).body  # its modules are the model's

    @property
    def body(self) -> nn.Module:
        """What is run."""
        found: nn.Module = self.__dict__["_body"]
        return found

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """States [B, L, H]; logits where the head is not understood."""
        told = self.body(**inputs, **without_cache(self.body))
        states: torch.Tensor = told["last_hidden_state" if "last_hidden_state" in told else "logits"]
        return states


def prove(model: PreTrainedModel, batch: Batch, causal: bool, ds_config: dict[str, Any], where: object) -> Apart:
    """How documents are kept apart in this model, found out in fp32; a collective. The model is used up.

    Args:
        model: unread, as it will be trained.
        batch: one row of text as it will be trained on.
        causal: whether a token sees only those before it.
        where: the base, for the message.

    Raises InputError where nothing keeps them apart.
    """
    module = _Body(model)
    with frozen(module, in_fp32(ds_config)) as (ask, device):
        found, failed = apart(ask, module.body, model.config, to_device(batch, device), causal)
    if found is None:
        tried = "; ".join(f"{way} {outcome}" for way, outcome in failed.items())
        problem = f"is 'documents', but nothing keeps packed documents apart in {where} ({tried}): expected 'full'"
        raise InputError("attention", problem)
    return found
