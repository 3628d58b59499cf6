"""Causal language models: every token is told from those before it (Radford et al. 2019 and all decoders since)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from recyclable.errors import InputError
from recyclable.lm.parts.generative import GenerativeLM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from recyclable.data.examples import Batch, Examples
    from recyclable.data.layout import Layout
    from recyclable.data.packing import Joined, Packed
    from recyclable.weights.base import Base


class Causal(GenerativeLM):
    """Next tokens; documents as the tokenizer begins them, closed by its end token, one after the other."""

    term: ClassVar[str] = "clm"
    model_class: ClassVar[str] = "CausalLM"
    causal: ClassVar[bool] = True

    lm: Literal["causal"] = "causal"

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        """By the class its config names, else where a causal one is all that its type has."""
        named = [name for name in config.get("architectures") or [] if isinstance(name, str)]
        if any(name.endswith(("ForCausalLM", "ForMaskedLM")) for name in named):  # without importing transformers
            return named[0].endswith("ForCausalLM")
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

        kind = config.get("model_type")
        of_class = {name: which for which in (CAUSAL, MASKED) for name in which.values()}  # masked where it is both
        found = [of_class[name] for name in named if name in of_class]
        return found[0] is CAUSAL if found else kind in CAUSAL and kind not in MASKED

    def require(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        """It must be a decoder: transformers has causal classes of encoders too, whose tokens see all others."""
        from recyclable.models.language import is_decoder

        if not is_decoder(base.config):
            kind = base.config.model_type
            raise InputError(base.folder, f"is {kind!r}, no causal language model; expected a decoder, or another lm")

    def layout(self, tokenizer: PreTrainedTokenizerBase) -> Layout:
        """A stream without anything at the seams of sequences."""
        from recyclable.data.layout import streamed

        return streamed(tokenizer)

    def examples(
        self, packed: Packed | Joined, tokenizer: PreTrainedTokenizerBase, base: Base, indices: Sequence[int]
    ) -> Examples:
        """The same in every epoch."""
        from recyclable.data.blocks import CausalBlocks

        return CausalBlocks(packed, indices, self.attention == "documents")

    def full_batch(self, rows: int) -> Batch:
        """Every token but the first is told."""
        from recyclable.data.token_rows import full_batch

        return self.whole_documents(full_batch(rows, self.max_length, has_encoder=False))
