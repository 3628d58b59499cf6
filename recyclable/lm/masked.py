"""Masked language models (Devlin et al. 2019, arXiv 1810.04805): some tokens are hidden, and told from all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from recyclable.errors import InputError
from recyclable.lm.parts.kind import HeadSettings, LMKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from recyclable.data.examples import Batch, Examples
    from recyclable.data.packing import Joined, Packed
    from recyclable.weights.base import Base


class Masked(LMKind):
    """A share of the tokens is masked; full sequences of text between the tokenizer's begin and end."""

    term: ClassVar[str] = "mlm"
    model_class: ClassVar[str] = "MaskedLM"
    sees_all: ClassVar[bool] = True

    lm: Literal["masked"] = "masked"
    mlm_probability: float = Field(0.15, gt=0, lt=1)
    mlm_head: Literal["auto", "keep", "fresh"] = "auto"
    """auto: keep a trained masked-LM head, make one where the base has none; keep and fresh insist."""
    mlm_head_steps: int | None = Field(None, ge=0)
    """Steps a fresh head trains alone, backbone and embeddings frozen; null: a tenth of max_steps."""
    mlm_head_learning_rate: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _read_by_fresh_head(self) -> Masked:
        if self.mlm_head == "keep":
            self.require_unset(("mlm_head_steps", "mlm_head_learning_rate"), "with mlm_head: keep")
        return self

    def require(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        """Its tokenizer must have a mask token."""
        if tokenizer.mask_token_id is None:
            raise InputError(base.folder, "its tokenizer has no mask token, expected a masked language model")

    def examples(
        self, packed: Packed | Joined, tokenizer: PreTrainedTokenizerBase, base: Base, indices: Sequence[int]
    ) -> Examples:
        """Masked anew in every epoch."""
        from recyclable.data.blocks import MaskedBlocks

        apart = self.attention == "documents"
        return MaskedBlocks(packed, tokenizer, self.mlm_probability, self.seed, indices, apart)

    def full_batch(self, rows: int) -> Batch:
        """As many tokens are masked as hardly ever are: three standard deviations more than on average."""
        import math

        import torch

        tokens, chance = rows * self.max_length, self.mlm_probability
        masked = min(tokens, math.ceil(tokens * chance + 3 * math.sqrt(tokens * chance * (1 - chance))))
        ids = torch.zeros(rows, self.max_length, dtype=torch.long)
        targets = torch.zeros(masked, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": targets, "targets": targets}
        return self.whole_documents(batch)

    def head(self) -> HeadSettings:
        """By the settings that masked models have had from the first."""
        return HeadSettings("mlm_head", self.mlm_head, self.mlm_head_steps, self.mlm_head_learning_rate)
