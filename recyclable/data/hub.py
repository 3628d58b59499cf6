"""Data sets of the Hugging Face hub, or of its local cache, with one clear error for the many ways to miss them."""

from __future__ import annotations

from pathlib import Path

import datasets

from recyclable.errors import InputError


def load_hub(name: str, cache_dir: str | Path | None = None) -> datasets.DatasetDict:
    """All splits of a data set; `name` is "name" or "name:config".

    Raises:
        InputError: it cannot be had: no such data set or configuration, or no connection.
    """
    path, _, config = name.partition(":")
    try:
        cache = None if cache_dir is None else str(cache_dir)
        return datasets.load_dataset(path, config or None, cache_dir=cache, trust_remote_code=False)
    except Exception as error:  # they share no base class
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            name,
            f"no such path here, and the hub data set {path!r} could not be loaded ({type(error).__name__}: {reason})",
        ) from error


def pick_split(data: datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    """One split; raises InputError naming the splits there are."""
    if split not in data:
        raise InputError(name, f"no split {split!r}, found {sorted(data)}")
    return data[split]
