"""Span corruption: an encoder reads a text with spans taken out, a decoder tells them (Raffel et al. 2020, T5)."""

from __future__ import annotations

from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from recyclable.errors import InputError
from recyclable.lm.parts.generative import GenerativeLM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from recyclable.data.corruption import Spans as Taken
    from recyclable.data.examples import Batch, Examples
    from recyclable.data.packing import Joined, Packed
    from recyclable.weights.base import Base

_SENTINEL = "<extra_id_{}>"
"""How T5's tokenizers, and those after them, call what stands for a span."""


class Spans(GenerativeLM):
    """A share of the tokens in spans; `max_length` counts the tokens before they are taken out."""

    term: ClassVar[str] = "spans"
    model_class: ClassVar[str] = "Seq2SeqLM"

    lm: Literal["spans"] = "spans"
    noise_density: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that is taken out."""
    mean_span_length: float = Field(3.0, ge=1)
    """Tokens of a span, on average."""

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        """Every encoder-decoder."""
        return config.get("is_encoder_decoder") is True

    def require(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        """An encoder-decoder, and a tokenizer with sentinels enough and an end token."""
        if not base.config.is_encoder_decoder:
            raise InputError(base.folder, f"is {base.config.model_type!r}, expected an encoder-decoder for lm: spans")
        if not isinstance(start := self._start(base), int) or not 0 <= start < base.config.vocab_size:
            problem = f"decoder_start_token_id is {start!r}, expected a token's id: a decoder's text begins with it"
            raise InputError(base.folder / "config.json", problem)
        if tokenizer.eos_token_id is None:
            raise InputError(base.folder, "its tokenizer has no end token (eos_token), which closes a decoder's text")
        taken = self._taken(tokenizer)
        if not taken.sentinels:
            problem = f"its tokenizer has no {_SENTINEL.format(0)}, expected sentinels as T5's tokenizer has them"
            raise InputError(base.folder, problem)
        if (most := taken.most(self.max_length)) > len(taken.sentinels):
            there = f"the tokenizer of {base.folder} has {len(taken.sentinels)} sentinels"
            raise InputError("max_length", f"{self.max_length} tokens may have {most} spans taken out, but {there}")

    def examples(
        self, packed: Packed | Joined, tokenizer: PreTrainedTokenizerBase, base: Base, indices: Sequence[int]
    ) -> Examples:
        """Taken out anew in every epoch."""
        from recyclable.data.blocks import SpanBlocks

        start, end = self._start(base), tokenizer.eos_token_id
        assert start is not None and isinstance(end, int), "required before"
        apart = self.attention == "documents"
        return SpanBlocks(packed, self._taken(tokenizer), end, start, self.seed, indices, apart)

    def full_batch(self, rows: int) -> Batch:
        """Sequences of one document each."""
        from recyclable.data.corruption import Spans as Taken
        from recyclable.data.token_rows import TokenRow, batch_of

        noise, spans = Taken(self.noise_density, self.mean_span_length, ()).counts(self.max_length)
        told, read = noise + spans + 1, self.max_length - noise + spans
        row = TokenRow([0] * (told + 1), range(1, told + 1), [0] * read)
        return self.whole_documents(batch_of([row] * rows, 0, None))

    def _taken(self, tokenizer: PreTrainedTokenizerBase) -> Taken:
        from recyclable.data.corruption import Spans as Taken

        known = tokenizer.get_vocab()
        names = takewhile(known.__contains__, (_SENTINEL.format(number) for number in count()))
        sentinels = tuple(known[name] for name in names)
        return Taken(self.noise_density, self.mean_span_length, sentinels, tuple(tokenizer.all_special_ids))

    @staticmethod
    def _start(base: Base) -> int | None:
        return getattr(base.config, "decoder_start_token_id", None)
