"""What a model tuned elsewhere is besides its tensors: fields of its config, tokenizer, names of labels, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from recyclable.architectures.fields import tuned_fields
from recyclable.errors import InputError
from recyclable.tasks.parts.task import Task
from recyclable.weights.base import Base, read_config
from recyclable.weights.generation_file import read_generation
from recyclable.weights.manifest import GENERATION
from recyclable.weights.reader import Reader
from recyclable.weights.reading import reading_digest
from recyclable.weights.strict_json import read_json
from recyclable.weights.tokenizer_files import tokenizer_files
from recyclable.weights.vocabulary import align, copy_tokenizer, row_count, tokens

_UNLIMITED = 1 << 30
"""transformers writes 1e30 for a tokenizer that knows of no limit."""
_SHORTEST = 2
"""A text's special tokens alone."""


@dataclass(frozen=True)
class Told:
    """What somebody says of tuned weights, for what their files do not."""

    labels: tuple[str, ...] | None = None
    """Names in the order of the head's rows."""
    max_length: int | None = None
    """Tokens that a text was cut at."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that they were tuned with."""

    @classmethod
    def asked(cls, labels: Sequence[str] | None, max_length: int | None, tokenizer: Path | None) -> Told:
        """As somebody names it on a command line; InputError where it makes no sense."""
        if labels is not None and (len(set(labels)) < max(2, len(labels)) or "" in labels):
            raise InputError(
                "--labels", f"found {','.join(labels)!r}, expected at least two different names, each once"
            )
        if max_length is not None and max_length <= _SHORTEST:
            raise InputError("--max-length", f"found {max_length}, expected more than {_SHORTEST}")
        if tokenizer is not None and not tokenizer.is_dir():
            raise InputError("--tokenizer", f"{tokenizer} is no directory")
        return cls(None if labels is None else tuple(labels), max_length, tokenizer)


NOTHING = Told()
"""Its files say it all."""


def config_of(tuned: Path) -> PretrainedConfig | None:
    """The tuned model's config; None where the directory has none (PEFT writes none)."""
    return read_config(tuned) if (tuned / "config.json").is_file() else None


def changed_fields(config: PretrainedConfig, base: Base, tuned: Path) -> dict[str, Any]:
    """The fields by which the tuned model computes otherwise than the base; InputError for another kind of model.

    The size of its vocabulary is not among them: rows follow their tokens.
    """
    if type(config) is not type(base.config):
        raise InputError(tuned, f"is a {config.model_type}, its base {base.folder} a {base.config.model_type}")
    return {name: value for name, value in tuned_fields(config, base.config).items() if name != "vocab_size"}


def tokenizer_with(tuned: Path, config: PretrainedConfig, base: Base, told: Told) -> Reader:
    """What read the texts it was tuned on: the tokenizer that came with it or is told, else the base's.

    Raises InputError where it has the base's pieces in other rows: it was tuned on another base then.
    """
    if told.tokenizer is not None and not tokenizer_files(told.tokenizer, config):
        raise InputError("--tokenizer", f"{told.tokenizer} holds no tokenizer")
    folder = told.tokenizer or tuned
    if not tokenizer_files(folder, config):
        return Reader(config, base.folder)
    reader = Reader(config, folder)
    if not tokenizer_files(base.folder) or row_count(base.config) is None:
        return reader
    rows = align(base, reader)
    here = np.flatnonzero(rows.old_row >= 0)
    if (rows.old_row[here] != here).any():
        raise InputError(folder, f"has another vocabulary than {base.folder}: {rows}")
    return reader


def rows_used(reader: Reader, base: Base, told: Told) -> int | None:
    """How many rows the tokens take that weights were tuned with; None where no tokenizer tells what added rows are."""
    rows, wanted = row_count(reader.config), row_count(base.config)
    if rows == wanted or rows is None or wanted is None:
        return rows
    if rows > wanted and reader.folder == base.folder and told.tokenizer is None:
        return None
    return 1 + max(tokens(reader).values()) if tokenizer_files(reader.folder, reader.config) else None


def keep_tokenizer(reader: Reader, base: Base, into: Path) -> dict[str, Any] | None:
    """Copy a tokenizer beside weights unless the base's reads alike; returns what their manifest says of it."""
    if reader.folder == base.folder:
        return None
    digest = reading_digest(reader.folder, reader.config)
    if tokenizer_files(base.folder) and digest == reading_digest(base.folder, base.config):
        return None
    return {"digest": digest, "files": sorted(copy_tokenizer(reader.folder, into, reader.config))}


def own_generation(tuned: Path, base: Base) -> dict[str, Any]:
    """How the tuned model generates text, as a field of its config: where a file beside it says it otherwise."""
    found = read_generation(tuned)
    return {} if found in (None, read_generation(base.folder)) else {GENERATION: found}


def cut_at(reader: Reader, base: Base, told: Told) -> int | None:
    """The tokens that texts were cut at, None for no limit: as told, else by the tokenizer's files, else positions.

    A tokenizer that came with the weights says how it cut the last text (`truncation` in tokenizer.json); any says what
    a model can take at most (`model_max_length`).
    """
    limit = reader.limit
    if limit is not None and limit <= _SHORTEST:
        raise InputError("num_virtual_tokens", f"is {reader.prompts}, which leaves a text {limit} positions")
    if told.max_length is not None:
        reader.require_length(told.max_length)
        return told.max_length
    last = None if reader.folder == base.folder else _truncation(reader.folder)
    most = reader.tokenizer().model_max_length if tokenizer_files(reader.folder, reader.config) else None
    lengths = [last, most, limit]
    return min((int(n) for n in lengths if n is not None and _SHORTEST < n < _UNLIMITED), default=None)


def _truncation(folder: Path) -> int | None:
    file = folder / "tokenizer.json"
    found = read_json(file).get("truncation") if file.is_file() else None
    length = found.get("max_length") if isinstance(found, dict) else None
    return length if type(length) is int else None


def is_named(labels: Sequence[str]) -> bool:
    """Whether labels have names, others than those transformers makes up."""
    return list(labels) != [f"LABEL_{i}" for i in range(len(labels))]


def label_names(found: list[str], told: Told, task: Task | None, tuned: Path) -> tuple[list[str], str]:
    """The names of the head's rows in order, and who gives them: `files`, `told`, `task` or `nobody`.

    Args:
        found: what the files say; made-up names (`is_named`) are none.

    Raises InputError where two say different things. A `task` may have no order of its own: `recipes.label_order`.
    """
    names, giver = found, "files" if is_named(found) else "nobody"
    if told.labels is not None:
        if len(told.labels) != len(found):
            problem = f"found {len(told.labels)} names, but {tuned} has a head for {len(found) or 1}"
            raise InputError("--labels", problem)
        if is_named(found) and list(told.labels) != found:
            raise InputError("--labels", f"found {list(told.labels)}, but {tuned} names its labels {found}")
        names, giver = list(told.labels), "told"
    if task is None:
        return names, giver
    wanted = list(task.labels)
    if len(names) != len(wanted) or (giver != "nobody" and set(names) != set(wanted)):
        raise InputError("--task", f"{task.name} has labels {wanted}, the weights {names}: expected the same")
    return (wanted, "task") if giver == "nobody" else (names, giver)
