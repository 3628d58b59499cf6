"""How many tokens a model has positions for."""

from __future__ import annotations

from transformers import PretrainedConfig

from recyclable.architectures.structure import Structure
from recyclable.errors import InputError


def require_length(config: PretrainedConfig, max_length: int | None) -> None:
    """InputError when sequences of `max_length` tokens have more positions than a model of this config."""
    limit = positions(config)
    if limit is not None and max_length is not None and max_length > limit:
        place = config.name_or_path
        raise InputError("max_length", f"is {max_length}, but {place} has positions for {limit} tokens at most")


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens there are positions for; None for a model without a limit."""
    return Structure(config).positions
