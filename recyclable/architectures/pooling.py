"""By which ids a family's classifiers find the token that they read: told by the names in their own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

PAD, END = "pad_token_id", "eos_token_id"


def class_for(config: PretrainedConfig, head: str) -> type[Any] | None:
    """transformers' class of this type of model for AutoModelFor`head`; None where it has none."""
    mapping = getattr(transformers, f"AutoModelFor{head}")._model_mapping
    found = mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def ids_read(config: PretrainedConfig, head: str = "SequenceClassification") -> frozenset[str]:
    """The fields of its config that such a model's own forward takes ids from; none for a family without the class.

    Decoders classify by the last token that is no padding, most encoder-decoders by the last end token; these shift
    what they read as well, which looks at more (`ids_shifted`).
    """
    found = class_for(config, head)
    return _names(found.forward) if found is not None else frozenset()


def ids_shifted(config: PretrainedConfig, head: str = "SequenceClassification") -> frozenset[str]:
    """Those that it needs to make the decoder's tokens of the encoder's."""
    found = class_for(config, head)
    shifts = found is not None and "_shift_right" in _names(found.forward)
    return _names(found._shift_right) if found is not None and shifts else frozenset()


def ends_tell(config: PretrainedConfig) -> bool:
    """Whether the sequence classifier of this family finds by ids where a text ends: padding has to stand behind it."""
    return not ids_read(config).isdisjoint((PAD, END))


def last_places(mask_BL: torch.Tensor) -> torch.Tensor:
    """The place of each row's last real token [B], wherever the padding stands, from an attention mask."""
    places = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return (mask_BL.to(places.dtype) * places).argmax(1)


def _names(function: Callable[..., Any]) -> frozenset[str]:
    """The attributes that a function's own code mentions."""
    return frozenset(inspect.unwrap(function).__code__.co_names)
