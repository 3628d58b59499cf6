"""LoRA (Hu et al. 2021, arXiv 2106.09685) by PEFT, with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) and DoRA (Liu et
al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_HIGHEST = 1 << 16
"""Rank: wider than any model's layers, which have no higher one."""


class Lora(Tuning):
    """A low-rank adapter; the head is trained and saved whole (`modules_to_save`)."""

    tuning: Literal["lora"] = "lora"
    lora_r: int = Field(8, gt=0, le=_HIGHEST)
    lora_alpha: int = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) rather than alpha / r."""
    use_dora: bool = False
    """Train a magnitude per output as well. The base is read whole by each rank at the start."""
    target_modules: list[str] | str | None = None
    """Modules the adapter attaches to, by the ends of their names, by a regular expression for whole names, or
    `all-linear`; null: PEFT's choice for the architecture."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0, le=_HIGHEST)]] = Field({})
    """Names of modules, or regular expressions for them -> another rank than `lora_r`."""
    alpha_pattern: dict[str, Annotated[int, Field(gt=0, lt=1 << 63)]] = Field({})
    """The same for `lora_alpha`."""

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """A PEFT model."""
        from peft import LoraConfig
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

        from recyclable.models.adapters import attach_fresh
        from recyclable.models.heads import head_modules
        from recyclable.tunings.parts.targets import require_adapted, require_quick, require_targets

        targets: Any = self.target_modules
        if targets is None:  # PEFT forgets its own choice where it renames a family's experts
            targets = USUAL.get(model.config.model_type, [])
        meant = require_targets(model, self.target_modules, default=targets)
        require_quick(self.rank_pattern, "rank_pattern")
        require_quick(self.alpha_pattern, "alpha_pattern")
        config = LoraConfig(
            task_type=task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_modules=targets,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            modules_to_save=head_modules(model),
        )
        return require_adapted(attach_fresh(model, config, self.tuning, seed), meant)
