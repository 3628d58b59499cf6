"""LoRA (Hu et al. 2021, arXiv 2106.09685) by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Lora(Tuning):
    """A low-rank adapter; the head is trained and saved whole (`modules_to_save`)."""

    tuning: Literal["lora"] = "lora"
    lora_r: int = Field(8, gt=0)
    lora_alpha: int = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | None = None
    """Modules the adapter attaches to; null: PEFT's choice for the architecture."""

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """A PEFT model."""
        from peft import LoraConfig

        from recyclable.models.adapters import attach_fresh
        from recyclable.models.heads import head_modules

        config = LoraConfig(
            task_type=task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            modules_to_save=head_modules(model),
        )
        return attach_fresh(model, config, self.tuning, seed)
