"""Text files, plain or gzipped, line by line: none longer than fits in memory, and broken bytes stay where they are."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, TextIO

from recyclable.data.bad_rows import BadRow, BadRows
from recyclable.data.gzip_members import WholeMembers
from recyclable.errors import InputError

LONGEST = 1 << 28
"""Characters of a row: one that does not end does not fill the memory either."""
NOT_UTF8 = "not valid UTF-8"


def open_text(path: Path, bad: BadRows, newline: str | None = None) -> TextIO:
    """A file whose bytes that are no UTF-8 become lone surrogates, which `require_utf8` finds; a byte order mark goes.

    Of gzip files whose bad rows are left out, broken members are as well.
    """
    encoded: Any = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    if path.suffix.lower() != ".gz":
        return path.open(**encoded)
    return gzip.open(WholeMembers(path, bad) if bad.skips else path, "rt", **encoded)


class Lines:
    """(number, line) of a file from where it stands; BadRow for one that is too long, behind which it goes on."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self._number, self._within = path, file, 0, False

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> tuple[int, str]:
        while self._within:  # a line that was too long, whose end is only looked for where somebody goes on
            self._within = not (rest := self._file.readline(1 << 20)).endswith("\n") and rest != ""
        line = self._file.readline(LONGEST)
        if not line:
            raise StopIteration
        self._number += 1
        if len(line) == LONGEST and not line.endswith("\n"):
            self._within = True
            raise too_long(f"{self._path}, line {self._number}")
        return self._number, line


def too_long(where: object) -> BadRow:
    """What is wrong with a row of more characters than `LONGEST`."""
    return BadRow(where, f"has more than {LONGEST} characters, expected shorter ones", "too long")


def require_utf8(where: object, text: str, what: str = "") -> str:
    """The text; BadRow if bytes that are no UTF-8 came with it, or half a surrogate pair that JSON wrote.

    Args:
        what: how the message begins where the place does not say all.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) - 0xDC00
            found = f"byte 0x{byte:02x}" if 0x80 <= byte <= 0xFF else "half a surrogate pair"
            problem = f"{what}not valid UTF-8 text ({found} at character {error.start}), expected UTF-8"
            raise BadRow(where, problem, NOT_UTF8) from error
    return text


def whole(path: Path, file: TextIO) -> str:
    """All of a file that is read at once; InputError for one that is too long for that."""
    text = file.read(2 * LONGEST)
    if len(text) == 2 * LONGEST:
        raise InputError(path, f"has {len(text)} characters or more in one array, expected an object per line (.jsonl)")
    return text
