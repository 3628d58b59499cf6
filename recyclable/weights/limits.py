"""How many tokens a model has positions for."""

from __future__ import annotations

from transformers import PretrainedConfig

from recyclable.architectures.structure import Structure
from recyclable.errors import InputError


def require_length(config: PretrainedConfig, max_length: int | None, prompts: int = 0) -> None:
    """InputError when sequences of `max_length` tokens have more positions than a model of this config.

    Args:
        prompts: positions that an adapter's prompts take.
    """
    limit = positions(config, prompts)
    if limit is not None and max_length is not None and max_length > limit:
        place = f"{config.name_or_path} has positions for {limit} tokens at most"
        beside = f" beside {prompts} of the adapter's prompts" if prompts else ""
        raise InputError("max_length", f"is {max_length}, but {place}{beside}")


def positions(config: PretrainedConfig, prompts: int = 0) -> int | None:
    """How many tokens of a text there are positions for; None for a model without a limit.

    Args:
        prompts: as for `require_length`.
    """
    limit = Structure(config).positions
    return None if limit is None else limit - prompts
