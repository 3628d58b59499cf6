"""Language models with trained prompts or prefixes, which stand in PEFT's own forward: their states, the head apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

    from recyclable.architectures.heads import LanguageHead


def is_prompted(model: nn.Module) -> bool:
    """Whether it is PEFT's, of a kind that puts something before a text."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def prompted_head(model: Any, of_base: Callable[[PreTrainedModel], LanguageHead]) -> LanguageHead:
    """The head of a language model with prompts, whose body is the whole of it up to the last layer.

    Args:
        of_base: gives the head of the model without prompts.
    """
    head = of_base(model.get_base_model())
    return replace(head, body=Prompted(model, head.body))


class Prompted(nn.Module):
    """PEFT's forward around the body of a language model in the place of all of it; prompts are cut off again.

    It has no parameters of its own, and the model is not a part of it: it is one of the objective already.
    """

    _model: Any
    _body: Any

    def __init__(self, model: Any, body: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_model=model, _body=body)

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> ModelOutput:
        """States (or logits) of the text's own tokens [B, L, ...], and those of the layers where they are asked for."""
        base, length = self._model.get_base_model(), inputs.get("decoder_input_ids", input_ids).shape[1]
        forward = self._body.forward
        if "use_cache" in inspect.signature(forward).parameters:
            inputs["use_cache"] = False

        def states(**told: Any) -> Any:
            given = {name: value for name, value in told.items() if value is not None}
            return forward(**given) if self._body is base else self._body(**given)

        with patch.object(base, "forward", states):
            found = self._model(input_ids=input_ids, **inputs)
        of_layers = found.get("decoder_hidden_states") or found.get("hidden_states")
        told = {"hidden_states": of_layers and tuple(states_BLH[:, -length:] for states_BLH in of_layers)}
        if "last_hidden_state" in found:
            return BaseModelOutput(last_hidden_state=found["last_hidden_state"][:, -length:], **told)
        return CausalLMOutput(logits=found["logits"][:, -length:], **told)
