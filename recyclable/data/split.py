"""The examples of one split of a task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Split:
    """Examples: texts (or lists of words, or conversations), their second texts if the task has pairs, and targets."""

    texts: list[Any]
    pairs: list[Any] | None
    """Second texts, or what a text's options are."""
    labels: list[Any]
    """Class indices, numbers, texts, or a list per text: of class indices, or of a 0 or 1 for each class."""
    file: str = field(default="", compare=False)
    places: list[int] | None = field(default=None, compare=False)
    """The rows of the file that they come from, for messages."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Split:
        """The examples at these positions, in this order."""
        chosen = [int(i) for i in indices]
        return Split(
            texts=[self.texts[i] for i in chosen],
            pairs=None if self.pairs is None else [self.pairs[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            file=self.file,
            places=None if self.places is None else [self.places[i] for i in chosen],
        )

    def place(self, index: int) -> str:
        """Where an example comes from, as messages say it."""
        return f"{self.file}, row {index + 1 if self.places is None else self.places[index]}"
