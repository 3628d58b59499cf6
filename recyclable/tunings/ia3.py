"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638) by PEFT: keys, values and feed-forward activations are rescaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Ia3(Tuning):
    """A factor per output of some modules, per input of others; the head is trained and saved whole."""

    tuning: Literal["ia3"] = "ia3"
    target_modules: list[str] | str | None = None
    """Modules it rescales, as for LoRA; null: PEFT's choice for the architecture."""
    feedforward_modules: list[str] | None = None
    """Those among them that are rescaled by what goes in; null, without `target_modules`: PEFT's choice."""

    @model_validator(mode="after")
    def _together(self) -> Ia3:
        if self.feedforward_modules is not None and self.target_modules is None:
            raise ValueError("feedforward_modules are given without target_modules, among which they must be")
        return self

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """A PEFT model."""
        from peft import IA3Config
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as USUAL

        from recyclable.models.adapters import attach_fresh
        from recyclable.models.heads import head_modules
        from recyclable.tunings.parts.targets import require_targets

        require_targets(model, self.target_modules, default=USUAL.get(model.config.model_type, []))
        require_targets(model, self.feedforward_modules, "feedforward_modules")
        chosen = self.feedforward_modules or ([] if self.target_modules is not None else None)
        config = IA3Config(
            task_type=task_type,
            target_modules=self.target_modules,
            feedforward_modules=chosen,
            modules_to_save=head_modules(model),
        )
        return attach_fresh(model, config, self.tuning, seed)
