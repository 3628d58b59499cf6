"""What kinds of tasks have in common whose answers are text: told by a language-model head, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from recyclable.data.examples import Batch
from recyclable.tasks.parts.kind import Labels, TaskKind

if TYPE_CHECKING:
    from recyclable.data.split import Split
    from recyclable.tasks.parts.files import Raw


class TextAnswers(TaskKind):
    """Rows R of losses are tokens to be told, C is the vocabulary. There are no classes: few-shot samples are of all
    examples alike."""

    over_vocabulary: ClassVar[bool] = True
    has_labels: ClassVar[bool] = False

    def claims(self, train: Raw) -> int:
        """Rows with its columns, which no other kind has."""
        return 1

    def strata(self, split: Split) -> list[int]:
        """All in one."""
        return [0] * len(split)

    def stratum_name(self, stratum: int, labels: Labels) -> str:
        """There is but one."""
        return ""

    def targets(self, batch: Batch) -> torch.Tensor:
        """The tokens to be told."""
        return batch["targets"]

    def count(self, batch: Batch) -> int:
        """How many they are."""
        return len(batch["targets"])

    def loss_sum(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(rows.float(), targets, reduction="sum")
