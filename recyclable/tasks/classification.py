"""Classification: one label per text, or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from recyclable.data.examples import LabelledTexts, TaskExamples
from recyclable.data.split import Split
from recyclable.tasks.parts import metrics
from recyclable.tasks.parts.kind import Labels, Scores, TaskKind
from recyclable.tasks.parts.labels import class_index, class_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recyclable.tasks.parts.files import Raw


class Classification(TaskKind):
    """Which of several classes a text belongs to."""

    name: ClassVar[str] = "classification"
    problem_type: ClassVar[str | None] = "single_label_classification"

    def claims(self, train: Raw) -> int:
        """Whatever nobody else is surer of."""
        return 1

    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """Classes in order (`tasks.parts.labels.class_names`) and their indices."""
        labels = class_names(given, raws["train"].labels, raws["train"].where)
        index = {name: i for i, name in enumerate(labels)}
        splits = {}
        for split, raw in raws.items():
            rows = zip(raw.places, raw.labels, strict=True)
            indices = [class_index(label, index, raw, place, given is not None) for place, label in rows]
            splits[split] = Split(raw.texts, raw.pairs, indices)
        return labels, splits

    def strata(self, split: Split) -> list[int]:
        """The class."""
        return [int(label) for label in split.labels]

    def stratum_name(self, stratum: int, labels: Labels) -> str:
        """The class's name."""
        return labels[stratum]

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> TaskExamples:
        """Texts, `labels` [B] (int64)."""
        return LabelledTexts(split, tokenizer, max_length)

    def loss_sum(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(rows.float(), targets, reduction="sum")

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """Accuracy, or macro F1."""
        return "accuracy", "f1_macro"

    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """accuracy and f1_macro of logits [N, C] (`tasks.parts.metrics.of_classes`)."""
        return metrics.of_classes(predictions, targets)

    def ignorance(self, train: Split, labels: Labels) -> np.ndarray:
        """Log frequencies of the classes, each counted once more, so that none is impossible."""
        counts = np.bincount(train.labels, minlength=len(labels)) + 1
        return np.log(counts / counts.sum())
