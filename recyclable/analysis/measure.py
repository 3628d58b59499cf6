"""Loss and scores on labelled examples: of predictions, and of one model by this process alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from recyclable.data.examples import LabelledTexts
from recyclable.data.metrics import score
from recyclable.data.tasks import Problem
from recyclable.objectives.labelled import LabelledTask, task_sum
from recyclable.training.evaluation import predict
from recyclable.weights.team import ALONE

BATCH = 64
"""Examples of a forward pass."""


def measure(model: nn.Module, examples: LabelledTexts, problem: Problem) -> dict[str, float]:
    """`loss` (mean cross-entropy or squared error) and the scores of `data.metrics.score`.

    Args:
        model: in evaluation mode, with its values, on any device.
    """
    device = next(model.parameters()).device
    logits = predict(LabelledTask(model), examples, BATCH, device, ALONE)
    return loss_and_scores(logits, examples.labels, problem)


def loss_and_scores(predictions: np.ndarray, labels: torch.Tensor, problem: Problem) -> dict[str, float]:
    """`loss` and the scores of predictions [N, C] against labels [N]."""
    return {"loss": mean_loss(predictions, labels), **score(problem, predictions, labels.numpy())}


def mean_loss(predictions: np.ndarray, labels: torch.Tensor) -> float:
    """Mean cross-entropy, or squared error, of predictions [N, C] against labels [N]."""
    return float(task_sum(torch.from_numpy(predictions), labels)) / len(labels)
