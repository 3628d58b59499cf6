"""Prompts before a text hide its ids from a decoder's classifier, which then reads the last place, padding or not.

Here it reads the text's own last token, in batches as in a text alone: what PEFT gives of a single text.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn

from recyclable.architectures.pooling import PAD, class_for, ids_read, last_places

_EMBEDDED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)
"""Kinds whose texts come to the model as embeddings."""


def read_at_ends(model: PeftModel) -> PeftModel:
    """The model, whose classifier is given the logits of each text's last token at every place, where it needs it."""
    base, kind = model.get_base_model(), model.peft_config["default"].peft_type
    classifies = type(base) is class_for(base.config, "SequenceClassification") and PAD in ids_read(base.config)
    if kind not in _EMBEDDED or not classifies:
        return model
    beside = (child for child in base.children() if child is not base.base_model)
    (head,) = (child for child in beside if any(True for _ in child.parameters()))
    masks: list[torch.Tensor | None] = []

    def remember(_: nn.Module, __: Any, told: dict[str, Any]) -> None:
        masks[:] = [told.get("attention_mask")]

    def at_ends(_: nn.Module, __: Any, logits_BLC: torch.Tensor) -> torch.Tensor:
        if not masks or (mask_BL := masks.pop()) is None:
            return logits_BLC
        rows = torch.arange(len(logits_BLC), device=logits_BLC.device)
        return logits_BLC[rows, last_places(mask_BL)][:, None].expand_as(logits_BLC)

    base.register_forward_pre_hook(remember, with_kwargs=True)
    head.register_forward_hook(at_ends)
    return model
