"""Regression: one number per text, or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from recyclable.data.bad_rows import BadRow
from recyclable.data.examples import Batch, LabelledTexts, TaskExamples
from recyclable.data.split import Split
from recyclable.tasks.parts import metrics
from recyclable.tasks.parts.kind import Labels, Scores, TaskKind
from recyclable.tasks.parts.labels import number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recyclable.tasks.parts.files import Raw


class Regression(TaskKind):
    """How much of something a text has."""

    name: ClassVar[str] = "regression"
    problem_type: ClassVar[str | None] = "regression"
    has_labels: ClassVar[bool] = False

    def claims(self, train: Raw) -> int:
        """Rows of which a label is a number with a fractional part; in CSV and TSV all must spell numbers."""
        values = [number(label) if train.untyped or isinstance(label, float) else None for label in train.labels]
        if train.untyped and None in values:  # a cell may look like a number among names
            return 0
        return 2 if any(value is not None and not value.is_integer() for value in values) else 0

    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """No labels, and numbers."""
        numbers = {split: [number(label) for label in raw.labels] for split, raw in raws.items()}
        return (), {split: Split(raw.texts, raw.pairs, numbers[split]) for split, raw in raws.items()}

    def require_row(self, raw: Raw, at: int) -> None:
        """A number."""
        if number(label := raw.labels[at]) is None:
            raise BadRow(raw.place(at), f"label {label!r}, expected a finite number (regression)", "wrong type")

    def strata(self, split: Split) -> list[int]:
        """All in one."""
        return [0] * len(split)

    def stratum_name(self, stratum: int, labels: Labels) -> str:
        """There is but one."""
        return ""

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> TaskExamples:
        """Texts, `labels` [B] (fp32)."""
        return LabelledTexts(split, tokenizer, max_length)

    def full_targets(self, rows: int, length: int, labels: int) -> Batch:
        """A number per text."""
        return {"labels": torch.zeros(rows)}

    def loss_sum(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Squared error of [R, 1]."""
        return F.mse_loss(rows.float().squeeze(-1), targets, reduction="sum")

    def divergence_sum(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Half the squared distance of student/T and teacher/T, in fp32: the KL of two Gaussians of unit variance.

        The softmax of a single output is always 1 and its KL always 0; with this T^2 cancels.
        """
        return 0.5 * ((student.float() - teacher.float()) / temperature).square().sum()

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """Correlations; of the squared error less is better."""
        return "pearson", "spearman"

    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """pearson, spearman and mse of numbers [N, 1] (`tasks.parts.metrics.of_numbers`)."""
        return metrics.of_numbers(predictions, targets)

    def ignorance(self, train: Split, labels: Labels) -> np.ndarray:
        """The mean."""
        return np.array([np.mean(train.labels)])

    def encoded(self, targets: np.ndarray) -> np.ndarray:
        """The numbers themselves."""
        return targets[:, None]

    def decoded(self, fitted: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
        """The numbers themselves."""
        return fitted
