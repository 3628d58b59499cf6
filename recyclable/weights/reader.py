"""What reads texts for a model, how long they may be, and what pads them: the one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.architectures.fields import with_fields
from recyclable.architectures.pooling import END, PAD, ends_tell, ids_read, ids_shifted
from recyclable.architectures.structure import Structure
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import GENERATION
from recyclable.weights.tokenizer_files import tokenizer_files
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
    padded_by_config: bool = False
    """The config's pad token is one that weights were tuned with, and goes before the tokenizer's own."""

    @classmethod
    def of(cls, base: Base, weights: AdaptedWeights | None = None, fields: dict[str, Any] | None = None) -> Reader:
        """A base's own; with weights on it theirs, where they were tuned with another.

        Args:
            fields: those that the weights' config has on this base; None: as the manifest has them.
        """
        if weights is None:
            return cls(base.config, base.folder)
        changed = weights.manifest.config if fields is None else fields
        config = with_fields(base.config, changed)
        inner = [value for name, value in changed.items() if isinstance(value, dict) and name != GENERATION]
        recorded = any(PAD in fields for fields in (changed, *inner))
        return cls(config, weights.tokenizer or base.folder, weights.prompts, recorded)

    @cached_property
    def limit(self) -> int | None:
        """How many tokens of a text there are positions for; None for a model without a limit."""
        positions = Structure(self.config).positions
        return None if positions is None else positions - self.prompts

    def require_length(self, max_length: int | None, name: str = "max_length") -> None:
        """InputError, which names the setting, when texts of `max_length` tokens have more positions than the model."""
        if self.limit is not None and max_length is not None and max_length > self.limit:
            place = f"{self.config.name_or_path} has positions for {self.limit} tokens at most"
            beside = f" beside {self.prompts} of the adapter's prompts" if self.prompts else ""
            raise InputError(name, f"is {max_length}, but {place}{beside}")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a pad token, read once; InputError without any, or with more pieces than the model has
        rows for.

        For a model that finds a text's end by its ids padding stands behind the text: left of it, positions and
        prompts would be others than those of the text alone.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        found = load_tokenizer(self.folder, self.config)
        if (pad := self._chosen(found)) is None:
            problem = "its tokenizer has no pad token, and no end or unknown token that could stand for one"
            raise InputError(self.folder, f"{problem}: expected pad_token in tokenizer_config.json")
        if pad != found.pad_token_id:
            found.pad_token = found.convert_ids_to_tokens(pad)
        if ends_tell(self.config):
            found.padding_side = "right"
        return found

    def fields(self, head: str) -> dict[str, Any]:
        """The fields of the model's config that reading needs otherwise than they are: its pad token.

        Args:
            head: transformers' AutoModelFor... that reads; for one that never looks at the pad token there are none.
        """
        if PAD not in ids_read(self.config, head) | ids_shifted(self.config, head):
            return {}
        own = self.config.get_text_config()
        if (pad := self._pad) in (None, own.pad_token_id):
            return {}
        inside = next((name for name, value in vars(self.config).items() if value is own), None)
        return {PAD: pad} if inside is None else {inside: {PAD: pad}}

    def config_for(self, head: str) -> PretrainedConfig:
        """The model's config with these fields."""
        return with_fields(self.config, self.fields(head))

    def settings(self, head: str) -> dict[str, str]:
        """What tokenizer_config.json says otherwise where such a model is to read as it does here."""
        own, found = load_tokenizer(self.folder, self.config), {}
        if self._pad not in (None, own.pad_token_id):
            found["pad_token"] = own.convert_ids_to_tokens(self._pad)
        if own.padding_side != "right" and not ids_read(self.config, head).isdisjoint((PAD, END)):
            found["padding_side"] = "right"
        return found

    @cached_property
    def _pad(self) -> int | None:
        """As `_chosen`; None without a tokenizer, too: that is said where texts are read."""
        known = tokenizer_files(self.folder, self.config)
        return self._chosen(load_tokenizer(self.folder, self.config)) if known else None

    def _chosen(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The id of the pad token: the tokenizer's, else the config's, the end token or the unknown one; None for none.

        Where the end of a text is told by ids, none that the tokenizer itself puts there, unless base and tokenizer
        agree on it.
        """
        of_config = getattr(self.config.get_text_config(), PAD, None)
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == of_config:
            return of_config
        first = (of_config, tokenizer.pad_token_id) if self.padded_by_config else (tokenizer.pad_token_id, of_config)
        barred = self._ends(tokenizer) if ends_tell(self.config) else set()
        for token in (*first, tokenizer.eos_token_id, tokenizer.unk_token_id):
            if token is not None and 0 <= token < len(tokenizer) and token not in barred:
                return token
        return None

    def _ends(self, tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
        """What stands at a text's end and so cannot stand behind it."""
        read = getattr(self.config, END, None) if END in ids_read(self.config) else None
        return {behind_a_text(tokenizer), read}


def behind_a_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that the tokenizer puts at the end of a text; None for none."""
    alone, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return None if whole[-len(alone) :] == alone else whole[-1]
