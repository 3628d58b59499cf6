"""The exceptions that are shown as one line: mistakes in what the user gave, what ends a run, being asked to end."""

from __future__ import annotations

_LONGEST = 10_000  # characters of a message


class InputError(Exception):
    """Bad config, data, weights or checkpoint, found before anything is written or trained.

    The message is one line: the field or file, what was found, what was expected and, where it helps, what to do.
    """

    exit_status = 2

    def __init__(self, where: object, problem: str) -> None:
        self.where = str(where)
        super().__init__(printable(shortened(" ".join(f"{where}: {problem}".split()), _LONGEST)))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:  # on its way between processes
        return type(self), (self.where, str(self).removeprefix(f"{self.where}: "))


class RunError(InputError):
    """What ends a run under way for a reason outside of it, such as a full disk: shown as one line as well."""

    exit_status = 1


class Preempted(BaseException):
    """A run ends because somebody asked it to; it can be gone on with. The message is one line that says so.

    A signal raises it anywhere, also where any `Exception` is taken for the failure of what was tried.
    """

    exit_status = 75


def shown(value: object) -> str:
    """A value of a data file as messages have it: not the whole of it where it is long."""
    return shortened(repr(value), 200)


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: 2 * most // 3]} ... {text[len(text) - most // 4 :]}"


def printable(text: str) -> str:
    """A text for a terminal, lines and tabs as they are: names in files may hold anything, escape sequences too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
