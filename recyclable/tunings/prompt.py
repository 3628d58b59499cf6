"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691) by PEFT: states of no token stand before the text's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Prompt(Tuning):
    """Trained states before the text's; the head is trained and saved whole."""

    tuning: Literal["prompt"] = "prompt"
    num_virtual_tokens: int = Field(20, gt=0, le=1024)
    """How many; so many fewer positions are left for a text."""

    @property
    def prompts(self) -> int:
        """As many."""
        return self.num_virtual_tokens

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """A PEFT model."""
        from peft import PromptTuningConfig

        from recyclable.models.adapters import attach_fresh
        from recyclable.models.heads import head_modules
        from recyclable.tunings.parts.prompts import require_promptable

        require_promptable(model, task_type, self.tuning)
        config = PromptTuningConfig(
            task_type=task_type, num_virtual_tokens=self.num_virtual_tokens, modules_to_save=head_modules(model)
        )
        return attach_fresh(model, config, self.tuning, seed)
