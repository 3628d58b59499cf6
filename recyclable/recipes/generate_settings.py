"""What `recyclable generate` is told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from recyclable.config.settings import Settings


class GenerateSettings(Settings):
    """`recyclable generate`: a base (+ weights) + prompts -> answers."""

    purpose: ClassVar[str] = "generate"

    base: str
    """A decoder or encoder-decoder with its language-model head."""
    weights: str | None = None
    """Adapted weights to put on it: a directory, or a name in the store; null: the base alone."""
    old_base: str | None = None
    """The base that the weights belong to; null: found by the names in manifest and lineage."""
    store: str | None = None
    allow_unrelated: bool = False
    """The weights may go on a base that is no recorded descendant of their own."""
    max_new_tokens: int = Field(128, gt=0)
    """An answer is cut there."""
    do_sample: bool = False
    """Draw tokens; else each is the likeliest one."""
    temperature: float | None = Field(None, gt=0)
    """What logits are divided by before tokens are drawn; null: as the base's generation_config.json says, else 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw only of the likeliest tokens that together have this probability; null: the base's, else of all."""
    top_k: int | None = Field(None, ge=0)
    """Draw only of the k likeliest tokens, 0 of all; null: the base's, else of all."""
    seed: int | None = Field(None, ge=0)
    """Decides, with a prompt's number among all, what is drawn for it; null is 20."""
    eval_batch_size: int = Field(16, gt=0)
    """Prompts per forward pass and rank."""
    out: Path | None = None
    """The file that the answers go to, JSON lines; null: nowhere."""

    @model_validator(mode="after")
    def _read(self) -> GenerateSettings:
        if not self.do_sample:
            self.require_unset(("temperature", "top_p", "top_k", "seed"), "without do_sample")
        if self.weights is None:
            self.require_unset(("old_base", "store", "allow_unrelated"), "without weights")
        return self
