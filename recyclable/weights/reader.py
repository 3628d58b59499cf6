"""What reads texts for a model, and how long they may be: its base's tokenizer, or one its weights were tuned with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.architectures.fields import with_fields
from recyclable.architectures.structure import Structure
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.vocabulary import load_tokenizer


@dataclass(frozen=True)
class Reader:
    """A tokenizer beside the model that is told its ids."""

    config: PretrainedConfig
    """The model's."""
    folder: Path
    """The tokenizer's directory."""
    prompts: int = 0
    """Positions before a text that an adapter's prompts take."""

    @classmethod
    def of(cls, base: Base, weights: AdaptedWeights | None = None) -> Reader:
        """A base's own; with weights on it theirs, where they were tuned with another."""
        if weights is None:
            return cls(base.config, base.folder)
        config = with_fields(base.config, weights.manifest.config)
        return cls(config, weights.tokenizer or base.folder, weights.prompts)

    @cached_property
    def limit(self) -> int | None:
        """How many tokens of a text there are positions for; None for a model without a limit."""
        positions = Structure(self.config).positions
        return None if positions is None else positions - self.prompts

    def require_length(self, max_length: int | None) -> None:
        """InputError when texts of `max_length` tokens have more positions than the model."""
        if self.limit is not None and max_length is not None and max_length > self.limit:
            place = f"{self.config.name_or_path} has positions for {self.limit} tokens at most"
            beside = f" beside {self.prompts} of the adapter's prompts" if self.prompts else ""
            raise InputError("max_length", f"is {max_length}, but {place}{beside}")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; InputError where there is none, or one with more pieces than the model has rows for."""
        return load_tokenizer(self.folder, self.config)
