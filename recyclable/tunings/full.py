"""Full fine-tuning: every weight is trained; what is kept is the difference from the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Tuning):
    """All weights."""

    tuning: Literal["full"] = "full"

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> PreTrainedModel:
        """The model as it is."""
        return model
