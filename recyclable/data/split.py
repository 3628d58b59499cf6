"""The examples of one split of a task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Split:
    """Examples: texts (or lists of words), their second texts if the task has pairs, and targets."""

    texts: list[Any]
    pairs: list[str] | None
    labels: list[Any]
    """Class indices, numbers, or a list per text: of class indices, or of a 0 or 1 for each class."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Split:
        """The examples at these positions, in this order."""
        chosen = [int(i) for i in indices]
        return Split(
            texts=[self.texts[i] for i in chosen],
            pairs=None if self.pairs is None else [self.pairs[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
        )
