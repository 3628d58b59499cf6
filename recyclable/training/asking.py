"""A model that kinds of tasks ask about examples: in batches, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from recyclable.data.decoding import Decoding
from recyclable.data.examples import TaskExamples
from recyclable.errors import RunError
from recyclable.training.evaluation import predict
from recyclable.training.generation import generate
from recyclable.weights.team import Team


class Asked:
    """A task's objective in evaluation (`tasks.parts.kind.Ask`).

    Args:
        answers: `answers(batch, predict=True)`: the objective, or an engine around it.
        device: where its weights are.
        team: as in `training.evaluation.outputs`.
    """

    def __init__(
        self,
        answers: Callable[..., Any],
        batch_size: int,
        device: torch.device | str = "cpu",
        team: Team | None = None,
    ) -> None:
        self._answers, self._batch_size, self._device, self._team = answers, batch_size, device, team

    def predict(self, examples: TaskExamples) -> np.ndarray:
        """Predictions [N, ..., C] (fp32) for all examples, in their order, on every rank.

        Raises RunError for NaN: a score that counts it as wrong says nothing of what became of the weights.
        """
        found = predict(self._answers, examples, self._batch_size, self._device, self._team)
        if broken := int(np.isnan(found.reshape(len(found), -1)).any(axis=1).sum()):
            problem = (
                f"{broken} of {len(found)} are NaN: weights or activations are damaged, so that there is no result"
            )
            raise RunError("predictions", problem)
        return found

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, rules: GenerationConfig
    ) -> list[list[int]]:
        """Answers to prompts, in their order, on every rank."""
        return generate(self._answers, prompts, decoding, rules, self._batch_size, self._device, self._team)
