"""Masked language models (Devlin et al. 2019, arXiv 1810.04805): some tokens are hidden, and told from all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from recyclable.config.settings import TrainSettings
from recyclable.errors import InputError
from recyclable.lm.parts.kind import LMKind

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recyclable.data.examples import Examples
    from recyclable.data.packing import Packed
    from recyclable.objectives.objective import Objective
    from recyclable.weights.base import Base


class Masked(LMKind):
    """A share of the tokens is masked; full sequences of text between the tokenizer's begin and end."""

    term: ClassVar[str] = "mlm"

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

    def examples(self, packed: Packed, tokenizer: PreTrainedTokenizerBase, indices: range) -> Examples:
        """Masked anew in every epoch."""
        from recyclable.data.examples import MaskedBlocks

        return MaskedBlocks(packed, tokenizer, self.mlm_probability, self.seed, indices)

    def model(self, base: Base) -> tuple[PreTrainedModel, list[str]]:
        """With the base's masked-LM head, or a fresh one."""
        from recyclable.models.language import language_model

        if self.mlm_head == "keep":
            model, missing = language_model(base, "MaskedLM", self.seed, self.dropout)
            if missing:
                problem = f"is 'keep', but {base.folder} has no trained head (lacks {missing[0]})"
                raise InputError("mlm_head", problem)
            return model, missing
        return language_model(base, "MaskedLM", self.seed, self.dropout, fresh_head=self.mlm_head == "fresh")

    def teaching(self, base: Base) -> PreTrainedModel:
        """With its trained head."""
        from recyclable.models.language import language_model

        model, missing = language_model(base, "MaskedLM", self.seed, None)
        if missing:
            raise InputError("teacher", f"{base.folder} has no trained masked-LM head (lacks {missing[0]})")
        return model

    def objective(self, model: nn.Module, teacher: nn.Module | None) -> Objective:
        """The masked tokens; with a teacher also its distributions over them."""
        from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
        from recyclable.objectives.token_loss import TokenLoss
        from recyclable.objectives.token_states import Compared

        if teacher is None:
            return TokenLoss(model, self.term)
        return TokenDistillation(
            model,
            TokenTeacher(teacher, Compared(first=True) if self.beta else None),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            divergence=self.divergence,
            mixing=self.mixing,
            term=self.term,
        )

    def head_phase(self) -> TrainSettings | None:
        """The head alone: gradients through a random head would wreck the backbone first."""
        steps = self.max_steps // 10 if self.mlm_head_steps is None else self.mlm_head_steps
        changed = {"max_steps": steps, "learning_rate": self.mlm_head_learning_rate, "warmup_steps": 0, "save_every": 0}
        return self.model_copy(update=changed) if steps else None
