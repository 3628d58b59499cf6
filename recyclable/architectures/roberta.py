"""RoBERTa and its kin: BERT's layers under a masked-LM head of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from recyclable.architectures.bert import HEADS, NEURONS, WAY
from recyclable.architectures.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _masked_head(model: PreTrainedModel) -> tuple[Callable[[torch.Tensor], torch.Tensor], nn.Module]:
    head = model.lm_head
    return lambda states: head.layer_norm(F.gelu(head.dense(states))), head.decoder


ROBERTA = Family(
    ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text"),
    HEADS,
    NEURONS,
    _masked_head,
    WAY,
    classifies_first=True,
)
