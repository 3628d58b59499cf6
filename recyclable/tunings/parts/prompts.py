"""Where PEFT can put trained prompts and prefixes before a text, and where it fails."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from recyclable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_promptable(model: PreTrainedModel, task_type: str, tuning: str, cache: bool = False) -> None:
    """InputError for a model that prompts cannot stand before.

    Args:
        cache: they are keys and values, of which the model's forward must take some.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder and task_type != "SEQ_2_SEQ_LM":
        problem = f"is {tuning}, which a {type(model).__name__} cannot have before a text"
        raise InputError("tuning", f"{problem}: expected another, or a task whose answers are text")
    forwards = [inspect.signature(type(part).forward).parameters for part in (model, model.base_model)]
    if cache and not any("past_key_values" in parameters for parameters in forwards):
        raise InputError("tuning", f"is {tuning}, but a {kind} takes no keys and values from elsewhere")
