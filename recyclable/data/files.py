"""Rows out of user files, one by one, with every mistake told by file and line: text, JSON, CSV and Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from recyclable.data.delimited import delimited_rows
from recyclable.errors import InputError

TEXT_FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".conll")
FORMATS = (*TEXT_FORMATS, *(f"{suffix}.gz" for suffix in TEXT_FORMATS), ".parquet")

Row = tuple[int, dict[str, Any]]


def format_of(path: Path) -> str | None:
    """The member of `FORMATS` that the file name ends with, or None."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """Yield (place, {column: value}) for every row of one file, holding one row (.parquet: one batch) in memory.

    The place is the line number, or the row number (from 1) in .parquet files and .json arrays. A .txt file has the one
    column "text" and a row per line. Values keep the type the file gives them: CSV and TSV cells are strings, an empty
    cell is None; ClassLabel columns of a Parquet file written by `datasets` become their names. `columns` limits what
    is read from Parquet, where that saves work; columns that are not there are left for the caller to notice.

    CSV and TSV may be quoted or not: a cell in quotes may hold delimiters and line ends, and quotes in a TSV file are
    plain characters where one begins a cell that it does not end and each line has as many cells as the header
    (`data.delimited`).

    A .json file is one array of objects, or one object per line. A .conll file has a word and its tags per line, in
    columns parted by tabs or blanks, and empty lines between sentences (CoNLL-2003; -DOCSTART- is left out, and so are
    comments, lines before a sentence that begin with "# "): a row is a sentence with the lists "tokens" (first column),
    "tags" (last column) and, by their number from 0, all other columns.

    Raises:
        InputError: no such file, unsupported extension, not UTF-8, broken gzip, JSON, CSV or Parquet.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    suffix = format_of(path)
    if suffix is None:
        raise InputError(path, f"unsupported extension, expected one of {', '.join(FORMATS)}")
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, columns)
            return
        with _open_text(path, suffix) as file:
            kind = suffix.removesuffix(".gz")
            if kind == ".txt":
                yield from ((number, {"text": line.rstrip("\n")}) for number, line in enumerate(file, 1))
            elif kind in (".csv", ".tsv"):
                yield from delimited_rows(path, file, "\t" if kind == ".tsv" else ",")
            elif kind == ".conll":
                yield from _conll_rows(path, file)
            elif kind == ".json" and _first_character(file) == "[":
                yield from _array_rows(path, file)
            else:
                yield from _json_line_rows(path, file)
    except UnicodeDecodeError as error:
        raise InputError(path, f"not valid UTF-8 text ({error.reason}), expected UTF-8") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(path, f"broken gzip file ({error})") from error


def _open_text(path: Path, suffix: str) -> TextIO:
    newline = "" if ".csv" in suffix or ".tsv" in suffix else None
    if suffix.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _first_character(file: TextIO) -> str:
    """The first character that is not white space; the file is rewound."""
    first = " "
    while first and first.isspace():
        first = file.read(1)
    file.seek(0)
    return first


def _json_line_rows(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}", f"broken JSON ({error.msg} at column {error.colno}), expected an object"
                ) from error
            except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
                raise InputError(f"{path}, line {number}", f"broken JSON ({error}), expected an object") from error
            yield number, _object(path, "line", number, row)


def _array_rows(path: Path, file: TextIO) -> Iterator[Row]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}", f"broken JSON ({error.msg} at column {error.colno})"
        ) from error
    except UnicodeDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise InputError(path, f"broken JSON ({error}), expected an array of objects") from error
    for number, row in enumerate(rows, 1):
        yield number, _object(path, "item", number, row)


def _object(path: Path, unit: str, number: int, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{path}, {unit} {number}", f"found JSON {type(row).__name__}, expected an object per row")
    return row


def _conll_rows(path: Path, file: TextIO) -> Iterator[Row]:
    words: list[list[str]] = []
    begin = width = 0
    for number, line in enumerate(chain(file, [""]), 1):
        line = line.rstrip()
        # Where tabs part the columns, a word may hold blanks.
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        if not words and (line.startswith("# ") or cells[:1] == ["-DOCSTART-"]):
            continue
        if line:
            if len(cells) < 2 or len(cells) != (width or len(cells)):
                expected = f"{width} as before" if width else "a word and its tag"
                raise InputError(f"{path}, line {number}", f"found {len(cells)} columns, expected {expected}")
            begin, width = begin if words else number, len(cells)
            words.append(cells)
        elif words:
            columns = [list(column) for column in zip(*words, strict=True)]
            between = {str(i): column for i, column in enumerate(columns[1:-1], 1)}
            yield begin, {"tokens": columns[0], "tags": columns[-1], **between}
            words = []


def read_features(path: Path) -> Mapping[str, Any]:
    """{column: feature of `datasets`} as a Parquet file declares them; empty for files of other formats.

    Raises InputError for a Parquet file that is not there or broken.
    """
    if format_of(path) != ".parquet":
        return {}
    if not path.is_file():
        raise InputError(path, "no such file")
    with _parquet(path) as (_, features):
        return features


@contextmanager
def _parquet(path: Path) -> Iterator[tuple[pq.ParquetFile, Mapping[str, Any]]]:
    """A Parquet file and its features; what is wrong with it is an InputError."""
    from datasets import Features

    try:
        with pq.ParquetFile(path) as file:
            try:
                features = Features.from_arrow_schema(file.schema_arrow)
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever stands where they are kept
                raise InputError(path, f"declares its columns as no version of `datasets` does ({error})") from error
            yield file, features
    except (pa.ArrowException, OSError) as error:
        raise InputError(path, f"broken Parquet file ({error})") from error


def _parquet_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    with _parquet(path) as (file, features):
        if columns is not None and all(name in features for name in columns):
            features = {name: features[name] for name in columns}
        number = 0
        for batch in file.iter_batches(batch_size=1000, columns=list(features)):
            for row in batch.to_pylist():
                number += 1
                yield number, with_names(row, features)


def check_text(where: object, number: int, column: str, value: object) -> str:
    """The value, if it is a string that can be written as UTF-8; else raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{where}, row {number}", f"column {column!r} is {value!r}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}, row {number}", f"column {column!r} is no valid Unicode ({error.reason})") from error
    return value


def with_names(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a data set of `datasets` with names in place of ClassLabel indices, also inside of lists."""
    return {column: _named(value, features[column]) for column, value in row.items()}


def label_names(feature: Any) -> tuple[str, ...] | None:
    """The names that a feature of `datasets` declares for classes, in order, also inside of lists; None: no names."""
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if names is not None:
        return tuple(names)
    return None if inner is None else label_names(inner)


def _named(value: Any, feature: Any) -> Any:
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if names is not None:  # a missing label is None, or -1 as `datasets` also writes it
        if value is None or value < 0:
            return None
        return names[value] if value < len(names) else value  # a class without a name is no label of any task
    return [_named(each, inner) for each in value] if isinstance(value, list) and inner is not None else value
