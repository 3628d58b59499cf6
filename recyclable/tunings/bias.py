"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): of the base only biases are trained, beside the task's head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from recyclable.errors import InputError
from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Bias(Tuning):
    """All biases; what is kept is their difference from the base, so that it goes wherever a delta does."""

    tuning: Literal["bias"] = "bias"

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> PreTrainedModel:
        """The model, everything but biases and the task's head frozen."""
        from recyclable.models.heads import head_modules

        heads, found = head_modules(model), False
        for name, parameter in model.named_parameters():
            bias, of_head = name.rpartition(".")[2].endswith("bias"), not set(heads).isdisjoint(name.split("."))
            found |= bias and not of_head
            parameter.requires_grad_(bias or of_head)
        if not found:
            raise InputError("tuning", f"is {self.tuning}, but a {model.config.model_type} has no biases")
        return model
