"""Examples of a task whose answers are text: rows of tokens, as a decoder or an encoder-decoder reads them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Self

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from recyclable.architectures.structure import Structure
from recyclable.data.examples import Batch, Examples
from recyclable.data.order import Item
from recyclable.data.prompts import added
from recyclable.data.readable import require_embedded, require_positions
from recyclable.data.split import Split
from recyclable.data.token_rows import TokenRow, batch_of, padding
from recyclable.weights.generation_rules import rules_of
from recyclable.weights.vocabulary import row_count


class TokenExamples(ABC):
    """Texts in tokens, as a decoder reads them until `readable_by` is told of another model.

    Args:
        max_length: tokens that a text is cut to, and the most that a batch is padded to; None: nothing is cut.
    """

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self.split, self.tokenizer, self.max_length = split, tokenizer, max_length
        self.config: PretrainedConfig | None = None
        self.prompted = 0

    @property
    @abstractmethod
    def rows(self) -> list[TokenRow]:
        """What is trained on, a row per example."""

    @property
    @abstractmethod
    def labels(self) -> torch.Tensor:
        """[N]"""

    @property
    def asked(self) -> Examples:
        """What predictions are made of."""
        return self

    @property
    def read_rows(self) -> list[TokenRow]:
        """All rows that a model reads, in training or when it is asked."""
        return self.rows

    @property
    def remark(self) -> str | None:
        """What somebody should know of what `max_length` did to them."""
        return None

    def readable_by(self, config: PretrainedConfig, prompts: int = 0) -> Self:
        """The same examples as a base with this config reads them; InputError where it could not.

        Args:
            prompts: positions before a text that an adapter's prompts take.
        """
        read = copy.copy(self)
        for name in [name for name in vars(read) if isinstance(getattr(type(self), name, None), cached_property)]:
            del vars(read)[name]
        read.config, read.prompted = config, prompts
        decoded, encoded = [row.ids for row in read.read_rows], [row.source or [] for row in read.read_rows]
        for texts in (decoded, encoded):
            require_embedded({"input_ids": texts}, self.tokenizer, config)
            if self.max_length is None:
                require_positions(texts, self.tokenizer, config, prompts)
        return read

    @property
    def vocabulary(self) -> int:
        """How many tokens the model can say."""
        found = None if self.config is None else row_count(self.config.get_text_config())
        return len(self.tokenizer) if found is None else found

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are for an encoder and answers for a decoder."""
        return self.config is not None and bool(self.config.is_encoder_decoder)

    @cached_property
    def rules(self) -> GenerationConfig:
        """How the model begins and ends what it generates."""
        config = self.config or PretrainedConfig(name_or_path=self.tokenizer.name_or_path)
        return rules_of(config, self.tokenizer)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a prompt."""
        texts = (text for text in self.split.texts if isinstance(text, str) and text)
        before, behind = added(self.tokenizer, next(texts, ""))
        return before, behind if self.has_encoder else []

    @cached_property
    def limit(self) -> int | None:
        """How many tokens of a text the model has positions for; None for a model without a limit."""
        positions = None if self.config is None else Structure(self.config).positions
        return None if positions is None else positions - self.prompted

    def answered(self, source: list[int], answer: list[int]) -> TokenRow:
        """A row of an encoder-decoder."""
        begin = self.rules.decoder_start_token_id
        ids = [self.rules.bos_token_id if begin is None else begin, *answer]
        return TokenRow(ids, range(1, len(ids)), source)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array([len(row) for row in self.rows])

    def digest(self, index: int) -> bytes:
        """What identifies an example to a model, 16 bytes of SHA-256."""
        return self.rows[index].digest()

    def batch(self, items: list[Item]) -> Batch:
        """`data.token_rows.batch_of` the examples' rows."""
        return self.padded([self.rows[index] for _, index in items])

    def padded(self, rows: list[TokenRow]) -> Batch:
        """Rows side by side."""
        return batch_of(rows, padding(self.tokenizer), self.max_length)
