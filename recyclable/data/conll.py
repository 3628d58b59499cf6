"""Rows of CoNLL files: a word and its tags per line, an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recyclable.data.bad_rows import BadRow
from recyclable.data.lines import require_utf8


class ConllRows:
    """(line it begins in, row) of each sentence, in CoNLL-2003's format; BadRow for one that is broken, and it goes on.

    Columns are parted by tabs or blanks. -DOCSTART- is left out, and so are comments, lines before a sentence that
    begin with "# ". A row has the lists "tokens" (first column), "tags" (last column) and, by their number from 0, all
    other columns.

    Args:
        lines: (number, line).
    """

    def __init__(self, path: Path, lines: Iterator[tuple[int, str]]) -> None:
        self._path, self._lines = path, lines
        self._width = 0

    def __iter__(self) -> ConllRows:
        return self

    def __next__(self) -> tuple[int, dict[str, Any]]:
        words: list[list[str]] = []
        begin = number = 0
        wrong: BadRow | None = None
        while True:
            try:
                number, line = next(self._lines, (0, ""))
                if words and not line.strip():
                    break
                if not number:
                    raise StopIteration
                cells = self._cells(number, line, inside=bool(words))
            except BadRow as error:  # the rest of its sentence goes with it
                cells, wrong = ["", ""], wrong or error
            if cells:
                begin = begin or number
                words.append(cells)
        if wrong is not None:
            raise wrong
        columns = [list(column) for column in zip(*words, strict=True)]
        between = {str(i): column for i, column in enumerate(columns[1:-1], 1)}
        return begin, {"tokens": columns[0], "tags": columns[-1], **between}

    def _cells(self, number: int, line: str, inside: bool) -> list[str]:
        """The columns of a line; none where it belongs to no sentence."""
        where = f"{self._path}, line {number}"
        line = require_utf8(where, line).rstrip()
        # Where tabs part the columns, a word may hold blanks.
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        if not line or (not inside and (line.startswith("# ") or cells[:1] == ["-DOCSTART-"])):
            return []
        if len(cells) < 2 or len(cells) != (self._width or len(cells)):
            expected = f"{self._width} as before" if self._width else "a word and its tag"
            raise BadRow(where, f"found {len(cells)} columns, expected {expected}", "wrong number of columns")
        self._width = len(cells)
        return cells
