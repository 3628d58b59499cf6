"""The columns that kinds of tasks read, and which of several layouts a file's first row has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recyclable.tasks.parts.cells import LABEL, TEXT, Cell


@dataclass(frozen=True)
class Column:
    """A column of a kind's rows."""

    key: str
    """What names it in a task file."""
    name: str
    """Its name in the files, where the task file does not say."""
    holds: Cell = TEXT
    needed: bool = True


@dataclass(frozen=True)
class Columns:
    """A layout of rows: the columns of what is asked, of what belongs to it, and of the target."""

    text: Column = Column("text", "text")
    pair: Column | None = Column("text_pair", "text_pair", needed=False)
    label: Column | None = Column("label", "label", LABEL)
    rank: int = 0
    """Of layouts that a row has alike, the one of the lowest rank is taken."""

    @property
    def every(self) -> list[Column]:
        """Those there are."""
        return [column for column in (self.text, self.pair, self.label) if column is not None]

    @property
    def keys(self) -> list[str]:
        """What names them in a task file."""
        return [column.key for column in self.every]

    def named(self, spec: Mapping[str, Any]) -> Columns:
        """With the names that a task file gives."""

        def renamed(column: Column | None) -> Column | None:
            return column and replace(column, name=spec.get(column.key, column.name))

        text = replace(self.text, name=spec.get(self.text.key, self.text.name))
        return replace(self, text=text, pair=renamed(self.pair), label=renamed(self.label))

    def match(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """How well a row has these columns, to be compared: with all of them, with many, with lists where lists are."""
        needed = [column for column in self.every if column.needed]
        there = [column for column in needed if column.name in row]
        fitting = [column for column in there if column.holds.fits(row[column.name])]
        if len(fitting) == len(needed):
            return 1, len(needed), 0, -self.rank
        return 0, len(there), sum(column.holds.telling for column in fitting), -self.rank


def choose(layouts: Iterable[Columns], spec: Mapping[str, Any], row: Mapping[str, Any]) -> Columns:
    """The layout that a row has best, as it is declared.

    A task file that names the column of what is asked (`text`, `prompt` ...) thereby says which layouts are meant.
    """
    layouts = list(layouts)
    asked = {layout.text.key for layout in layouts} & spec.keys()
    meant = [layout for layout in layouts if asked <= {layout.text.key}] or layouts
    return max(meant, key=lambda layout: layout.named(spec).match(row))


def listed(names: Collection[str]) -> str:
    """`a`, `b` and `c`."""
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}" if first else last
