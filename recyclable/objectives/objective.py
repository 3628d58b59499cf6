"""What every learning signal is: a module that turns a batch into named sums of losses, and says what to divide by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from recyclable.data.examples import Batch

Ask = Callable[[nn.Module], Any]
"""Some work with a model."""


class Objective(nn.Module, ABC):
    """A student and what it learns from, as one module, so that one engine and one ZeRO trace hold them.

    The loss of a step is sum over terms of weight * sum / count, where sums and counts run over every example of the
    step on all ranks and accumulation steps: ranks with unequal counts train the model that one process would.
    """

    weights: dict[str, float]
    """Term -> its weight in the loss; 0 for what is told but not learned from."""
    student: nn.Module
    """The model that is trained; everything else in the module is frozen."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Term -> what its sum is divided by; known from the batch alone, before any forward pass."""

    @abstractmethod
    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Term -> sum of its losses over the batch (scalar, fp32); one pass's terms where there are several passes."""

    def passes(self, step: int) -> Sequence[dict[str, Any]]:
        """What `sums` is told besides the batch, pass after pass: as many passes at every step, the same on all ranks.

        Each has a backward of its own, so that one pass's activations are alive at a time.
        """
        return ({},)

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter of another module that its forward uses): ZeRO-3 has to gather it there too."""
        return iter(())

    def predict(self, batch: Batch) -> torch.Tensor:
        """The student's predictions for evaluation."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to predict")

    def forward(self, batch: Batch, predict: bool = False, ask: Ask | None = None, **of_pass: Any) -> Any:
        """Sums, or predictions, or what else the student is asked; `batch` is nothing then.

        Everything runs inside the wrapped forward: ZeRO-3 gathers parameters there.
        """
        if ask is not None:
            return ask(self.student)
        return self.predict(batch) if predict else self.sums(batch, **of_pass)
