"""What every kind of tuning is: its settings, and how a model is made ready for it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from recyclable.config.settings import Settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Tuning(Settings):
    """The settings of one kind of tuning."""

    tuning: str
    """The kind's name."""

    @property
    def prompts(self) -> int:
        """Positions before a text that it takes."""
        return 0

    @abstractmethod
    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """The model with what is trained on it, everything else frozen; fresh values depend on the seed alone.

        Args:
            task_type: the task's in PEFT.
        """
