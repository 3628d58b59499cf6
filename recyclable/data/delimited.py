"""Rows of CSV files, and of TSV files, which may be quoted or not."""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from recyclable.data.bad_rows import BadRow, BadRows
from recyclable.data.lines import LONGEST, Lines, require_utf8, too_long
from recyclable.errors import InputError

_LINE_END = re.compile("\r\n|\r|\n")
_KIND = "broken quotes"
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


class DelimitedRows:
    """(line it begins in, {column: cell, or None where it is empty}) of each row; the header has the names.

    A cell in quotes may hold delimiters, line ends and doubled quotes: CSV is so by its standard (RFC 4180), TSV may
    be. Many a TSV file, as those of GLUE, is not quoted, and its texts may begin with a quote: where that is not
    closed at the end of its own cell, and each line has as many cells as the header, two at least, no quote of the
    whole file means anything.

    Behind a BadRow it goes on: with the next row, or, where a quote was broken, with the line behind the one in which
    the broken row begins.

    Args:
        path: for messages.
        file: opened with newline="", at its beginning; TSV is read twice.

    Raises:
        InputError: a header that cannot be read, or a name twice in it.
        BadRow: of a row of another width, or a quote without its closing one, with the line where it opens.
    """

    def __init__(self, path: Path, file: TextIO, delimiter: str) -> None:
        csv.field_size_limit(sys.maxsize)
        quoted = delimiter == "," or _is_quoted(path, file, delimiter)
        file.seek(0)
        self._path, self._delimiter, self._lines = path, delimiter, _RowLines(path, file)
        quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        self._reader = csv.reader(self._lines, delimiter=delimiter, strict=True, quoting=quoting)
        try:
            _, self._header = self._cells()
        except StopIteration:
            self._header = []
        except BadRow as error:
            raise InputError(path, str(error).removeprefix(f"{path}, ")) from error  # without it no row means anything
        if len(set(self._header)) < len(self._header):
            raise InputError(path, f"a column name appears twice in the header {self._header}")

    def __iter__(self) -> DelimitedRows:
        return self

    def __next__(self) -> tuple[int, dict[str, Any]]:
        begin, cells = self._cells()
        while not cells:  # an empty line
            begin, cells = self._cells()
        if len(cells) != len(self._header):
            last = self._lines.number
            together = f" in lines {begin} to {last}, which a quote holds together" if last > begin else ""
            problem = f"found {len(cells)} cells{together}, expected {len(self._header)} as in the header"
            raise BadRow(f"{self._path}, line {begin}", problem, "wrong number of cells")
        return begin, {name: cell or None for name, cell in zip(self._header, cells, strict=True)}

    def _cells(self) -> tuple[int, list[str]]:
        begin = self._lines.begin()
        try:
            cells = next(self._reader)
        except csv.Error as error:
            broken = _broken(self._path, "".join(self._lines.row), begin, self._delimiter, error)
            self._lines.again()
            raise broken from error
        require_utf8(f"{self._path}, line {begin}", "".join(self._lines.row))
        return begin, cells


class _RowLines:
    """The lines of a file; those of the row that is being read are kept, and all but its first can be read again."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._lines = path, Lines(path, file)
        self._again: deque[str] = deque()
        self.row: list[str] = []
        self.number = self._size = 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        if self._size > LONGEST:
            self.again()
            raise too_long(f"{self._path}, line {self.number}")
        self.number += 1  # of a line that is too long as well
        line = self._again.popleft() if self._again else next(self._lines)[1]
        self._size += len(line)
        self.row.append(line)
        return line

    def begin(self) -> int:
        """A row begins: the number of its line."""
        self.row, self._size = [], 0
        return self.number + 1

    def again(self) -> None:
        """Go back behind the row's first line."""
        self._again.extendleft(reversed(self.row[1:]))
        self.number -= len(self.row) - 1
        self.row, self._size = self.row[:1], 0


def _is_quoted(path: Path, file: TextIO, delimiter: str) -> bool:
    width, opens = 0, False
    for _, line in BadRows("skip").usable(Lines(path, file)):  # bad ones are told when they are read
        if not (line := line.rstrip("\r\n")):
            continue
        cells = line.split(delimiter)
        width = width or len(cells)
        if len(cells) != width:
            return True
        opens = opens or ('"' in line and any(cell[:1] == '"' and not _QUOTED.fullmatch(cell) for cell in cells))
    return not opens or width < 2  # the lines of one column prove nothing


def _broken(path: Path, row: str, begin: int, delimiter: str, error: csv.Error) -> BadRow:
    """What is wrong with a row in quotes, and where the cell opens."""
    cell = re.compile(rf'(?:{_QUOTED.pattern}|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)(?:{delimiter}|\r\n?|\n)')
    place = 0
    while match := cell.match(row, place):
        place = match.end()
    where = f"{path}, line {begin + len(_LINE_END.findall(row, 0, place))}"
    if row[place : place + 1] != '"':
        return BadRow(where, f"broken CSV ({error})", _KIND)
    end = "a tab" if delimiter == "\t" else "a comma"
    wanted = f"{end} or the end of the line"
    if delimiter == "\t":
        wanted += ", or no quoting and as many cells in each line as in the header"
    if closed := _QUOTED.match(row, place):
        rest = _LINE_END.split(row[closed.end() : closed.end() + 20])[0]
        problem = f"a cell in quotes opens here and goes on behind them with {rest!r}, expected {wanted}"
        return BadRow(where, problem, _KIND)
    problem = f'a cell opens here with a quote (") that is never closed, expected one before {wanted}'
    return BadRow(where, problem, _KIND)
