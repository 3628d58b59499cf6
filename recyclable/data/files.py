"""Rows out of user files, one by one, with every mistake told by file and line: text, JSON, CSV and Parquet."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, TextIO

from recyclable.data.bad_rows import BadRow, BadRows
from recyclable.data.conll import ConllRows
from recyclable.data.delimited import DelimitedRows
from recyclable.data.json_rows import array_rows, line_rows
from recyclable.data.lines import Lines, open_text, require_utf8
from recyclable.data.parquet import ParquetRows, opened
from recyclable.errors import InputError, shown

TEXT_FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".conll")
FORMATS = (*TEXT_FORMATS, *(f"{suffix}.gz" for suffix in TEXT_FORMATS), ".parquet")

Row = tuple[int, dict[str, Any]]


def format_of(path: Path) -> str | None:
    """The member of `FORMATS` that the file name ends with, or None."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_rows(path: Path, columns: list[str] | None = None, bad: BadRows | None = None) -> Iterator[Row]:
    """Yield (place, {column: value}) for every row of one file, holding one row (.parquet: one batch) in memory.

    The place is the line number, or the row number (from 1) in .parquet files and .json arrays. A .txt file has the one
    column "text" and a row per line. Values keep the type the file gives them: CSV and TSV cells are strings, an empty
    cell is None; ClassLabel columns of a Parquet file written by `datasets` become their names. `columns` limits what
    is read from Parquet, where that saves work; columns that are not there are left for the caller to notice.

    CSV and TSV may be quoted or not: a cell in quotes may hold delimiters and line ends, and quotes in a TSV file are
    plain characters where one begins a cell that it does not end and each line has as many cells as the header
    (`data.delimited`).

    A .json file is one array of objects, or one object per line. A .conll file has a word and its tags per line, in
    columns parted by tabs or blanks, and empty lines between sentences (`data.conll`).

    Args:
        bad: what becomes of rows that cannot be used; by default the first one is an error.

    Raises:
        InputError: no such file, unsupported extension, not UTF-8, broken gzip, JSON, CSV or Parquet.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    suffix, bad = format_of(path), bad or BadRows()
    if suffix is None:
        raise InputError(path, f"unsupported extension, expected one of {', '.join(FORMATS)}")
    if suffix == ".parquet":
        with opened(path) as (parquet, features):
            yield from bad.usable(ParquetRows(path, parquet, features, columns))
        return
    kind = suffix.removesuffix(".gz")
    try:
        with open_text(path, bad, newline="" if kind in (".csv", ".tsv") else None) as file:
            yield from bad.usable(_rows(path, file, kind))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(path, f"broken gzip file ({error})") from error


def _rows(path: Path, file: TextIO, kind: str) -> Iterator[Row]:
    """An iterator that goes on behind a BadRow."""
    if kind in (".csv", ".tsv"):
        return DelimitedRows(path, file, "\t" if kind == ".tsv" else ",")
    if kind == ".json" and _first_character(file) == "[":
        return array_rows(path, file)
    lines = Lines(path, file)
    if kind == ".conll":
        return ConllRows(path, lines)
    return line_rows(path, lines) if kind in (".json", ".jsonl") else starmap(partial(_text_row, path), lines)


def _text_row(path: Path, number: int, line: str) -> Row:
    return number, {"text": require_utf8(f"{path}, line {number}", line.rstrip("\n"))}


def _first_character(file: TextIO) -> str:
    """The first character that is not white space; the file is rewound."""
    first = " "
    while first and first.isspace():
        first = file.read(1)
    file.seek(0)
    return first


def read_features(path: Path) -> Mapping[str, Any]:
    """{column: feature of `datasets`} as a Parquet file declares them; empty for files of other formats.

    Raises InputError for a Parquet file that is not there or broken.
    """
    if format_of(path) != ".parquet":
        return {}
    if not path.is_file():
        raise InputError(path, "no such file")
    with opened(path) as (_, features):
        return features


def check_text(where: object, number: int, column: str, value: object) -> str:
    """The value, if it is a string that can be written as UTF-8 and holds no NUL; else raises BadRow."""
    place = f"{where}, row {number}"
    if not isinstance(value, str):
        raise BadRow(place, f"column {column!r} is {shown(value)}, expected a string", "wrong type")
    require_utf8(place, value, f"column {column!r} is ")
    if "\0" in value:
        problem = f"column {column!r} holds a NUL character at {value.index(chr(0))}, expected text"
        raise BadRow(place, problem, "NUL character")
    return value
