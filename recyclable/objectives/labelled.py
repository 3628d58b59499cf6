"""Labelled tasks: cross-entropy for classification, squared error for regression."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from recyclable.objectives.objective import SIGNAL_PREFIX, Batch, Objective


def model_inputs(batch: Batch) -> Batch:
    """What the model's forward takes: neither labels, so that no model computes a loss, nor a teacher's outputs."""
    return {name: t for name, t in batch.items() if name != "labels" and not name.startswith(SIGNAL_PREFIX)}


def task_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss of logits [B, C] against labels [B]: classes (int) or values (float; C = 1)."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")


class LabelledTask(Objective):
    """Learning from labels alone: batches hold the tokenizer's outputs [B, L] and `labels` [B]."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.weights = {"task": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"task": len(batch["labels"])}

    def sums(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"task": task_sum(self.predict(batch), batch["labels"])}

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits [B, C]."""
        return self.student(**model_inputs(batch)).logits
