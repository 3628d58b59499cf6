"""What language models share that tell whole texts, token after token: decoders and encoder-decoders."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from recyclable.lm.parts.kind import HeadSettings, LMKind


class GenerativeLM(LMKind):
    """Documents are kept apart unless asked for otherwise; the head is most often there, and kept."""

    attention: Literal["documents", "full"] = "documents"
    """documents: of the documents that share a sequence none sees another; full: they do."""
    lm_head: Literal["auto", "keep", "fresh"] = "auto"
    """auto: keep a trained language-model head, make one where the base has none; keep and fresh insist."""
    lm_head_steps: int | None = Field(None, ge=0)
    """Steps a fresh head trains alone, all else frozen; null: a tenth of max_steps."""
    lm_head_learning_rate: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _read_by_fresh_head(self) -> GenerativeLM:
        if self.lm_head == "keep":
            self.require_unset(("lm_head_steps", "lm_head_learning_rate"), "with lm_head: keep")
        return self

    def head(self) -> HeadSettings:
        """By the settings of its own."""
        return HeadSettings("lm_head", self.lm_head, self.lm_head_steps, self.lm_head_learning_rate)
