"""The processes that read and write weights together: one alone, or the ranks of a run."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class Team:
    """One process alone; `distributed.Ranks` are several."""

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """Every member's value, by rank; a collective."""
        return [value]


ALONE = Team()
