"""What becomes of rows that cannot be used: the first one is an error, or all are left out, counted and told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from recyclable.errors import InputError

Policy = Literal["refuse", "skip"]
_Row = TypeVar("_Row")


class BadRow(InputError):
    """A row that cannot be used, where the rest of its file can.

    Args:
        where: file and place.
        kind: what it is counted as, in words.
        rows: how many rows go with it.
    """

    def __init__(self, where: object, problem: str, kind: str, rows: int = 1) -> None:
        super().__init__(where, problem)
        self.kind, self.rows = kind, rows


@dataclass(frozen=True)
class Count:
    """Rows of one kind."""

    rows: int
    first: str
    """Where the first of them is."""


class BadRows:
    """The one judge of bad rows: a context whose body may raise `BadRow`, which `refuse` lets out and `skip` counts."""

    def __init__(self, policy: Policy = "refuse") -> None:
        self.policy = policy
        self.counts: dict[str, Count] = {}

    @property
    def skips(self) -> bool:
        """Whether they are left out."""
        return self.policy == "skip"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not (self.skips and isinstance(error, BadRow)):
            return False
        self._add(error.kind, Count(error.rows, error.where))
        return True

    def usable(self, rows: Iterator[_Row]) -> Iterator[_Row]:
        """The rows of an iterator that may raise `BadRow` for one and goes on with the next, as no generator does."""
        while True:
            with self:
                yield from rows
                return

    def add(self, counts: dict[str, Any]) -> None:
        """Add what `as_dict` said of rows that were left out before."""
        for kind, count in counts.items():
            self._add(kind, Count(**count))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: kind -> how many rows, and where the first is."""
        return {kind: {"rows": count.rows, "first": count.first} for kind, count in self.counts.items()}

    def __str__(self) -> str:
        listed = (f"{kind}: {count.rows} (first: {count.first})" for kind, count in self.counts.items())
        return f"{sum(count.rows for count in self.counts.values())} bad rows are left out: {', '.join(listed)}"

    def _add(self, kind: str, count: Count) -> None:
        before = self.counts.get(kind)
        self.counts[kind] = count if before is None else Count(before.rows + count.rows, before.first)
