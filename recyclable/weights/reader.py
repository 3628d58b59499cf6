"""What reads texts for a model: the base's tokenizer, or one that its weights were tuned with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.architectures.fields import with_fields
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

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; InputError where there is none, or one with more pieces than the model has rows for."""
        return load_tokenizer(self.folder, self.config)
