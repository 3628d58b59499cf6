"""What a cell of a task's column may hold: a text, a label, lists of them, a conversation, options to choose from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from recyclable.data.bad_rows import BadRow
from recyclable.data.files import check_text
from recyclable.errors import shown


class Cell(ABC):
    """A kind of cell."""

    telling: ClassVar[bool] = False
    """Whether a value that fits says more than that some column has this name."""

    @abstractmethod
    def fits(self, value: object) -> bool:
        """Whether a value looks like one, at first sight."""

    @abstractmethod
    def read(self, where: str, place: int, column: str, value: Any) -> Any:
        """The value of a row's column, as kinds of tasks take it; BadRow where it is none."""


class Text(Cell):
    """A string."""

    def fits(self, value: object) -> bool:
        return isinstance(value, str)

    def read(self, where: str, place: int, column: str, value: Any) -> str:
        return check_text(where, place, column, _there(where, place, column, value))


class Label(Cell):
    """A string or a number."""

    def fits(self, value: object) -> bool:
        return not isinstance(value, list)

    def read(self, where: str, place: int, column: str, value: Any) -> Any:
        if isinstance(_there(where, place, column, value), str):
            return check_text(where, place, column, value)
        if not isinstance(value, int | float):
            raise _wrong(where, place, column, value, "a string or a number")
        return value


class ListOf(Cell):
    """A list of cells, called `plural` in messages."""

    telling: ClassVar[bool] = True

    def __init__(self, each: Cell, plural: str) -> None:
        self._each, self._plural = each, plural

    def fits(self, value: object) -> bool:
        return isinstance(value, list)

    def read(self, where: str, place: int, column: str, value: Any) -> list[Any]:
        if not isinstance(_there(where, place, column, value), list):
            raise _wrong(where, place, column, value, f"a list of {self._plural}")
        return [self._each.read(where, place, column, one) for one in value]


class Messages(Cell):
    """A conversation: a list of {role, content}, and whatever else the chat template reads of a message."""

    telling: ClassVar[bool] = True

    def fits(self, value: object) -> bool:
        return isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value)

    def read(self, where: str, place: int, column: str, value: Any) -> list[dict[str, Any]]:
        wanted = "a list of messages, each {role: ..., content: ...}"
        if not self.fits(_there(where, place, column, value)) or not value:
            raise _wrong(where, place, column, value, wanted)
        return [self._message(where, place, column, one) for one in value]

    def _message(self, where: str, place: int, column: str, message: dict[str, Any]) -> dict[str, Any]:
        # Parquet gives every message every key that one of them has
        said = {key: value for key, value in message.items() if value is not None}
        if "content" in said or not said.get("tool_calls"):
            check_text(where, place, f"{column}.content", said.get("content"))
        check_text(where, place, f"{column}.role", said.get("role"))
        return said


class Choices(NamedTuple):
    """Options of a row, and what the file calls them (A, B ...), if anything."""

    texts: list[str]
    labels: list[str] | None


class Options(Cell):
    """Options to choose from: a list of texts or, as on the hub, {"text": [...], "label": [...]}."""

    telling: ClassVar[bool] = True

    def fits(self, value: object) -> bool:
        return isinstance(value, list) or (isinstance(value, dict) and {"text", "label"} <= value.keys())

    def read(self, where: str, place: int, column: str, value: Any) -> Choices:
        if not self.fits(_there(where, place, column, value)):
            raise _wrong(where, place, column, value, 'a list of texts, or {"text": [...], "label": [...]}')
        named = isinstance(value, dict)
        texts = TEXTS.read(where, place, column, value["text"] if named else value)
        labels = [str(label) for label in LABELS.read(where, place, column, value["label"])] if named else None
        if len(texts) < 2 or not all(texts):
            raise _wrong(where, place, column, value, "at least two options, none of them empty")
        if labels is not None and not len(texts) == len(labels) == len(set(labels)):
            raise _wrong(where, place, column, value, "a label for each option, all different")
        return Choices(texts, labels)


TEXT, LABEL, MESSAGES, OPTIONS = Text(), Label(), Messages(), Options()
TEXTS, WORDS, LABELS = ListOf(TEXT, "texts"), ListOf(TEXT, "words"), ListOf(LABEL, "labels")


def _there(where: str, place: int, column: str, value: Any) -> Any:
    """The value; BadRow for null, or NaN where a data frame lost it."""
    if value is None or value != value:
        raise BadRow(f"{where}, row {place}", f"column {column!r} is empty (null), expected a value", "empty cell")
    return value


def _wrong(where: str, place: int, column: str, value: object, wanted: str) -> BadRow:
    return BadRow(f"{where}, row {place}", f"column {column!r} is {shown(value)}, expected {wanted}", "wrong type")
