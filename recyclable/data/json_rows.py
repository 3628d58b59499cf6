"""Rows of JSON files: an object per line, or one array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, TextIO

from recyclable.data.bad_rows import BadRow
from recyclable.data.lines import require_utf8, whole
from recyclable.errors import InputError

Row = tuple[int, dict[str, Any]]
_BROKEN = "broken JSON"


def line_rows(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """(line, row) of a file with an object per line; BadRow for one that is none, and it goes on."""
    return filter(None, starmap(partial(_of_line, path), lines))


def array_rows(path: Path, file: TextIO) -> Iterator[Row]:
    """(number, row) of a file that is an array of objects; BadRow for an item that is none, and it goes on.

    Raises InputError for a file that is no array: it cannot be said where in it a row begins.
    """
    text = whole(path, file)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{_BROKEN} ({error.msg} at column {error.colno})"
        raise InputError(f"{path}, line {error.lineno}", problem) from error
    except (RecursionError, ValueError) as error:
        raise InputError(path, f"{_BROKEN} ({error}), expected an array of objects") from error
    clean = _is_utf8(text)
    return starmap(partial(_of_item, path, clean), enumerate(items, 1))


def _of_line(path: Path, number: int, line: str) -> Row | None:
    where = f"{path}, line {number}"
    if not require_utf8(where, line).strip():
        return None
    try:
        return number, _object(where, json.loads(line))
    except json.JSONDecodeError as error:
        problem = f"{_BROKEN} ({error.msg} at column {error.colno}), expected an object"
        raise BadRow(where, problem, _BROKEN) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise BadRow(where, f"{_BROKEN} ({error}), expected an object", _BROKEN) from error


def _of_item(path: Path, clean: bool, number: int, item: object) -> Row:
    where = f"{path}, item {number}"
    if not clean:
        require_utf8(where, json.dumps(item, ensure_ascii=False))
    return number, _object(where, item)


def _object(where: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(where, f"found JSON {type(row).__name__}, expected an object per row", _BROKEN)
    return row


def _is_utf8(text: str) -> bool:
    try:
        require_utf8("", text)
    except BadRow:
        return False
    return True
