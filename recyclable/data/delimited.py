"""Rows of CSV files, and of TSV files, which may be quoted or not."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from recyclable.errors import InputError

_LINE_END = re.compile("\r\n|\r|\n")
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


def delimited_rows(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line it begins in, {column: cell, or None where it is empty}) for each row; the header has the names.

    A cell in quotes may hold delimiters, line ends and doubled quotes: CSV is so by its standard (RFC 4180), TSV may
    be. Many a TSV file, as those of GLUE, is not quoted, and its texts may begin with a quote: where that is not
    closed at the end of its own cell, and each line has as many cells as the header, two at least, no quote of the
    whole file means anything.

    Args:
        path: for messages.
        file: opened with newline="", at its beginning; TSV is read twice.

    Raises:
        InputError: a name twice in the header; a row of another width, or a quote without its closing one, with the
            line where it opens.
    """
    csv.field_size_limit(sys.maxsize)
    quoted = delimiter == "," or _is_quoted(file, delimiter)
    file.seek(0)
    yield from _rows(path, file, delimiter, quoted)


def _is_quoted(file: TextIO, delimiter: str) -> bool:
    width, opens = 0, False
    for line in file:
        if not (line := line.rstrip("\r\n")):
            continue
        cells = line.split(delimiter)
        width = width or len(cells)
        if len(cells) != width:
            return True
        opens = opens or ('"' in line and any(cell[:1] == '"' and not _QUOTED.fullmatch(cell) for cell in cells))
    return not opens or width < 2  # the lines of one column prove nothing


class _Lines:
    """The lines of a file; those of the row that is being read are kept."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.row.append(next(self._file))
        return self.row[-1]


def _rows(path: Path, file: TextIO, delimiter: str, quoted: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = _Lines(file)
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)
    header: list[str] | None = None
    while True:
        lines.row, begin = [], reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _broken(path, "".join(lines.row), begin, delimiter, error) from error
        if cells is None:
            return
        if header is None:
            if len(set(cells)) < len(cells):
                raise InputError(path, f"a column name appears twice in the header {cells}")
            header = cells
        elif cells:
            if len(cells) != len(header):
                last = reader.line_num
                together = f" in lines {begin} to {last}, which a quote holds together" if last > begin else ""
                problem = f"found {len(cells)} cells{together}, expected {len(header)} as in the header"
                raise InputError(f"{path}, line {begin}", problem)
            yield begin, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _broken(path: Path, row: str, begin: int, delimiter: str, error: csv.Error) -> InputError:
    """What is wrong with a row in quotes, and where the cell opens."""
    cell = re.compile(rf'(?:{_QUOTED.pattern}|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)(?:{delimiter}|\r\n?|\n)')
    place = 0
    while match := cell.match(row, place):
        place = match.end()
    where = f"{path}, line {begin + len(_LINE_END.findall(row, 0, place))}"
    if row[place : place + 1] != '"':
        return InputError(where, f"broken CSV ({error})")
    end = "a tab" if delimiter == "\t" else "a comma"
    wanted = f"{end} or the end of the line"
    if delimiter == "\t":
        wanted += ", or no quoting and as many cells in each line as in the header"
    if closed := _QUOTED.match(row, place):
        rest = _LINE_END.split(row[closed.end() : closed.end() + 20])[0]
        return InputError(
            where, f"a cell in quotes opens here and goes on behind them with {rest!r}, expected {wanted}"
        )
    return InputError(where, f'a cell opens here with a quote (") that is never closed, expected one before {wanted}')
