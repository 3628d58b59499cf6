"""Turns examples into batches of tensors: what all of them have, and padded labelled texts."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.data.order import Item
from recyclable.data.readable import require_embedded, require_positions, require_readable
from recyclable.data.tokenising import enough

if TYPE_CHECKING:
    from recyclable.data.split import Split

Batch = dict[str, torch.Tensor]
"""What is known of some examples, by name; names with a dot are no model's inputs."""
_NO_INPUTS = frozenset(("labels", "positions", "targets", "documents", "decoder_documents"))
ROUND_LENGTH_TO = 8
"""Lengths of batches are rounded up to this, which matrix kernels like, but never beyond where texts are cut."""


class Examples(Protocol):
    """A finite set of examples that makes batches of any of them."""

    def __len__(self) -> int: ...

    def batch(self, items: list[Item]) -> Batch:
        """Tensors [len(items), ...] of the items, the same wherever and whenever they are asked for."""
        ...


class TaskExamples(Examples, Protocol):
    """Examples of a labelled task."""

    @property
    def labels(self) -> torch.Tensor:
        """[N, ...]"""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        ...

    @property
    def asked(self) -> Examples:
        """The same examples as predictions are made of them: what is trained on may be less."""
        ...

    @property
    def remark(self) -> str | None:
        """What somebody should know of what `max_length` did to them."""
        ...

    def digest(self, index: int) -> bytes:
        """What identifies an example to a model, 16 bytes."""
        ...

    def readable_by(self, config: PretrainedConfig, prompts: int = 0) -> TaskExamples:
        """Itself; InputError where a base with this config, or its head, could not read these examples.

        Args:
            prompts: positions before a text that an adapter's prompts take.
        """
        ...


OTHERS = "others."
"""Marks the entries of a batch that a teacher reads, where it has another tokenizer than its student."""


class ReadTwice:
    """Labelled texts as a student reads them, whose batches bring along what its teacher reads of the same texts.

    Args:
        own, others: the same examples, in the same order.
    """

    def __init__(self, own: TaskExamples, others: TaskExamples) -> None:
        self._own, self._others = own, others
        self.labels, self.asked, self.remark = own.labels, own.asked, own.remark
        self.lengths = np.maximum(own.lengths, others.lengths)
        self.digest = others.digest  # what a teacher's answer is known by

    def __len__(self) -> int:
        return len(self._own)

    def readable_by(self, config: PretrainedConfig, prompts: int = 0) -> ReadTwice:
        """Itself; as the student's examples have it."""
        self._own.readable_by(config, prompts)
        return self

    def batch(self, items: list[Item]) -> Batch:
        others = self._others.batch(items)
        return {**self._own.batch(items), **{OTHERS + name: tensor for name, tensor in others.items()}}


def as_teacher_reads(batch: Batch) -> Batch:
    """The part of a batch that is a teacher's; all of it where both read the same."""
    theirs = {name.removeprefix(OTHERS): tensor for name, tensor in batch.items() if name.startswith(OTHERS)}
    return theirs or batch


WHOLE = "texts.whole"
"""Marks a batch without padding, of whose mask models are told nothing: told of one they look whether it hides
anything, and on a GPU the host waits for the answer at every pass, with nothing queued behind it."""


def model_inputs(batch: Batch) -> Batch:
    """What a model's forward takes: no targets, so that no model computes a loss, and nothing that bears a dot."""
    unread = _NO_INPUTS | {"attention_mask"} if WHOLE in batch else _NO_INPUTS
    return {name: tensor for name, tensor in batch.items() if name not in unread and "." not in name}


def multiple_for(longest: int, max_length: int | None) -> int:
    """What the length of a batch is a multiple of, whose longest text has so many tokens."""
    fits = -(-longest // ROUND_LENGTH_TO) * ROUND_LENGTH_TO <= (max_length or 0)
    return ROUND_LENGTH_TO if fits else 1


class LabelledTexts:
    """Labelled texts, tokenised once; a batch is padded to its own longest text.

    Args:
        tokenizer: with a pad token (`weights.reader.Reader`).
        max_length: tokens that a text is cut to, and the most that a batch is padded to; None: no text is cut.
    """

    padding_side: str | None = None
    """Where a text is padded; None: where the tokenizer pads."""

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        columns = [split.texts] if split.pairs is None else [split.texts, split.pairs]
        if max_length is not None and split.pairs is None:  # of two it matters which is the longer
            columns = [enough(tokenizer, split.texts, max_length)]
        self._encoded = tokenizer(*columns, truncation=max_length is not None, max_length=max_length)
        self._tokenizer, self._max_length = tokenizer, max_length
        self.labels = torch.tensor(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def readable_by(self, config: PretrainedConfig, prompts: int = 0) -> LabelledTexts:
        """Itself; InputError where the classifier of a base with this config could not read these texts."""
        self._require_embedded(config, prompts)
        require_readable(self._encoded["input_ids"], self._tokenizer, config)
        return self

    @property
    def asked(self) -> LabelledTexts:
        """Themselves."""
        return self

    @property
    def remark(self) -> None:
        """Nothing."""
        return None

    def _require_embedded(self, config: PretrainedConfig, prompts: int) -> None:
        require_embedded(self._encoded, self._tokenizer, config)
        if self._max_length is None:
            require_positions(self._encoded["input_ids"], self._tokenizer, config, prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        return np.array([len(ids) for ids in self._encoded["input_ids"]])

    def digest(self, index: int) -> bytes:
        """What identifies an example to a model, 16 bytes of SHA-256: its tokens as cut, with their types."""
        tokens = {name: values[index] for name, values in self._encoded.items()}
        return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).digest()[:16]

    def batch(self, items: list[Item]) -> Batch:
        rows = [index for _, index in items]
        features = {name: [values[row] for row in rows] for name, values in self._encoded.items()}
        longest = max(len(ids) for ids in features["input_ids"])
        multiple = multiple_for(longest, self._max_length)
        shape = {"padding": "longest", "pad_to_multiple_of": multiple, "padding_side": self.padding_side}
        batch = self._tokenizer.pad(features, **shape, return_tensors="pt")
        return {**batch, "labels": self.labels[rows]}
