"""Loss and scores of one model on labelled examples, by this process alone."""

from __future__ import annotations

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
    loss = task_sum(torch.from_numpy(logits), examples.labels) / len(examples)
    return {"loss": float(loss), **score(problem, logits, examples.labels.numpy())}
