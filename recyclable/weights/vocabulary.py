"""Tokenizers of bases, and which rows of two versions' embeddings hold the same token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from recyclable.errors import InputError
from recyclable.weights.base import Base, read_config, reason
from recyclable.weights.durable import copy_files
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.own_files import require_own_files
from recyclable.weights.tokenizer_files import tokenizer_files


def load_tokenizer(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """A directory's own tokenizer.

    Args:
        config: of the model that reads with it; None is the directory's own.

    Raises InputError when there is none, or one with more pieces than the model has embeddings.
    """
    require_own_files(folder)
    config = config or read_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # every kind reads its files in its own way, some of them outside Python
        raise InputError(folder, f"holds no usable tokenizer: {reason(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where files are missing
        raise InputError(folder, "holds no usable tokenizer: expected tokenizer.json or a vocabulary")
    if not isinstance(most := tokenizer.model_max_length, int | float):
        raise InputError(folder, f"its tokenizer's model_max_length is {most!r}, expected a number")
    if (names := tokenizer.model_input_names)[:1] != ["input_ids"]:
        raise InputError(folder, f"its tokenizer's model_input_names is {names!r}, expected a list: input_ids first")
    if (rows := row_count(config)) is not None and len(tokenizer) > rows:
        raise InputError(folder, f"its tokenizer has {len(tokenizer)} pieces, but its embedding only {rows} rows")
    return tokenizer


def row_count(config: PretrainedConfig) -> int | None:
    """Rows of a model's embeddings of tokens; None for a model that has none (CANINE hashes characters)."""
    return getattr(config, "vocab_size", None)


def copy_tokenizer(source: Path, target: Path, config: PretrainedConfig | None = None) -> list[str]:
    """Copy a tokenizer's files, whatever its kind; returns their names.

    Args:
        config: as in `load_tokenizer`.
    """
    names = tokenizer_files(source, config)
    copy_files(source, target, names)
    return names


@dataclass(frozen=True)
class Rows:
    """How the rows of a new vocabulary relate to an old one's."""

    old_row: np.ndarray
    """int64 [rows of the new embedding]: the same token's row in the old embedding, -1 for none."""
    added: tuple[str, ...]
    """Tokens that only the new vocabulary has, by row."""
    dropped: tuple[str, ...]
    """Tokens that only the old one has, by row."""

    @property
    def unchanged(self) -> bool:
        """Whether both vocabularies have the same tokens in the same rows."""
        rows = np.flatnonzero(self.old_row >= 0)
        return not self.added and not self.dropped and bool((self.old_row[rows] == rows).all())

    def as_dict(self) -> dict[str, list[str]]:
        """Tokens that came and went, for JSON."""
        return {"added": list(self.added), "dropped": list(self.dropped)}

    def __str__(self) -> str:
        def some(tokens: tuple[str, ...]) -> str:
            return f"{len(tokens)}" + (f" ({', '.join(tokens[:5])}{', ...' * (len(tokens) > 5)})" if tokens else "")

        return f"rows aligned by token; new tokens: {some(self.added)}; dropped tokens: {some(self.dropped)}"


class Reads(Protocol):
    """A tokenizer's directory, and the config of the model that it reads for: a base is one."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> PretrainedConfig: ...


def tokens(reader: Reads) -> dict[str, int]:
    """Token -> row of the embeddings, of all that a tokenizer has; InputError where one has none."""
    found, rows = load_tokenizer(reader.folder, reader.config).get_vocab(), row_count(reader.config)
    if rows is not None and (beyond := sorted(token for token, row in found.items() if row >= rows)):
        raise InputError(reader.folder, f"its tokenizer has {beyond[0]!r} in row {found[beyond[0]]} of {rows}")
    return found


def rows_between(old: Base, new: Base) -> Rows | None:
    """As `align`; None where both have the same files of a tokenizer and as many rows."""
    names = vocabulary_tensors(old) & vocabulary_tensors(new)
    if tokenizer_digest(old) == tokenizer_digest(new) and all(old.shape(n)[0] == new.shape(n)[0] for n in names):
        return None
    return align(old, new)


def align(old: Reads, new: Reads) -> Rows:
    """Rows of `new`'s embeddings by token; rows beyond a tokenizer's pieces (padding) belong to no token."""
    before, after = tokens(old), tokens(new)
    old_row = np.full(row_count(new.config) or 1 + max(after.values()), -1, np.int64)
    for token, row in after.items():
        if token in before:
            old_row[row] = before[token]
    return Rows(
        old_row,
        tuple(sorted(after.keys() - before.keys(), key=after.__getitem__)),
        tuple(sorted(before.keys() - after.keys(), key=before.__getitem__)),
    )


def in_place(old: Base, new: Base) -> Rows:
    """Every row where it is, as many as both have, whatever token it belongs to."""
    rows = np.arange(new.config.vocab_size)
    return Rows(np.where(rows < old.config.vocab_size, rows, -1), (), ())


def vocabulary_tensors(base: Base) -> frozenset[str]:
    """Names of the base's tensors that have a row per token: input embeddings and an untied LM head."""
    return base.structure.vocabulary.intersection(base.names)
