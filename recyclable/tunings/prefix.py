"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190) by PEFT: keys and values of no token stand before each layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Prefix(Tuning):
    """Trained keys and values before every layer's; the head is trained and saved whole."""

    tuning: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(20, gt=0, le=1024)
    """How many; so many fewer positions are left for a text."""
    prefix_projection: bool = False
    """Train a small network that makes them; what it made is what is saved."""
    encoder_hidden_size: int | None = Field(None, gt=0, le=16384)
    """Width of that network; null: the model's."""

    @model_validator(mode="after")
    def _read_by_projection(self) -> Prefix:
        if not self.prefix_projection:
            self.require_unset(("encoder_hidden_size",), "without prefix_projection")
        return self

    @property
    def prompts(self) -> int:
        """As many."""
        return self.num_virtual_tokens

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """A PEFT model."""
        from peft import PrefixTuningConfig

        from recyclable.models.adapters import attach_fresh
        from recyclable.models.heads import head_modules
        from recyclable.tunings.parts.prompts import require_promptable

        require_promptable(model, task_type, self.tuning, cache=True)
        config = PrefixTuningConfig(
            task_type=task_type,
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=self.encoder_hidden_size,  # type: ignore[arg-type]  # None is its default
            modules_to_save=head_modules(model),
        )
        return attach_fresh(model, config, self.tuning, seed)
