"""How many tokens a base has positions for."""

from __future__ import annotations

from pathlib import Path

from recyclable.architectures.structure import Structure
from recyclable.errors import InputError
from recyclable.weights.base import read_config


def require_length(folder: Path, max_length: int) -> None:
    """InputError when sequences of `max_length` tokens have more positions than the base."""
    limit = positions(folder)
    if limit is not None and max_length > limit:
        raise InputError("max_length", f"is {max_length}, but {folder} has positions for {limit} tokens at most")


def positions(folder: Path) -> int | None:
    """How many tokens a base has positions for; None for a base without a limit."""
    return Structure(read_config(folder)).positions
