"""The exceptions that are shown as one line: mistakes in what the user gave, what ends a run, being asked to end."""

from __future__ import annotations


class InputError(Exception):
    """Bad config, data, weights or checkpoint, found before anything is written or trained.

    The message is one line: the field or file, what was found, what was expected and, where it helps, what to do.
    """

    exit_status = 2

    def __init__(self, where: object, problem: str) -> None:
        self.where = str(where)
        super().__init__(printable(" ".join(f"{where}: {problem}".split())))


class RunError(InputError):
    """What ends a run under way for a reason outside of it, such as a full disk: shown as one line as well."""

    exit_status = 1


class Preempted(Exception):
    """A run ends because somebody asked it to; it can be gone on with. The message is one line that says so."""

    exit_status = 75


def printable(text: str) -> str:
    """A text for a terminal, lines and tabs as they are: names in files may hold anything, escape sequences too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
