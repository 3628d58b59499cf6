"""`generation_config.json` beside a model, as data: how text is generated from it, and which tokens end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from recyclable.errors import InputError
from recyclable.weights.manifest import GENERATION
from recyclable.weights.strict_json import read_json

FILE = "generation_config.json"
_BOOKKEEPING = ("transformers_version", "_from_model_config", "_commit_hash")


def read_generation(folder: Path) -> dict[str, Any] | None:
    """What a directory's file says, without bookkeeping and what is null; None where it has none.

    Raises InputError for a file that transformers makes nothing of.
    """
    if not (folder / FILE).is_file():
        return None
    found = {name: value for name, value in read_json(folder / FILE).items() if value is not None}
    require_usable(found, folder / FILE)
    return {name: value for name, value in found.items() if name not in _BOOKKEEPING}


def told_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """What is said of generating from a model: as its weights brought it along, else as its base's directory has it.

    Raises InputError as `read_generation`.
    """
    if (own := vars(config).get(GENERATION)) is None:
        return read_generation(Path(config.name_or_path)) if config.name_or_path else None
    require_usable(own, GENERATION)
    return own


def require_usable(told: Any, where: object) -> None:
    """InputError, which names `where`, unless transformers reads it as a way to generate text."""
    try:
        GenerationConfig.from_dict(dict(told))
    except Exception as error:  # whatever transformers makes of its fields
        raise InputError(where, f"cannot be used: {error}") from error
