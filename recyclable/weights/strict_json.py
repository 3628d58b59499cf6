"""Reads JSON that anybody may have written: an object in UTF-8, each key once, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recyclable.config.opening import read_text
from recyclable.errors import InputError

_MAX_BYTES = 1 << 26  # longer than any index or dev curve


def read_json(path: Path, finite: bool = False, expected: str = "") -> dict[str, Any]:
    """The object in a file; InputError when it cannot be read, is no JSON object, or a key stands in it twice.

    Args:
        finite: refuse NaN and Infinity, which are no JSON.
        expected: what the file should be, for the message where it cannot be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(path, "is no file, expected JSON")
    return parse_json(read_text(path, _MAX_BYTES, expected), path, finite)


def parse_json(text: str, where: object, finite: bool = False) -> dict[str, Any]:
    """As `read_json`, of text; `where` is named in the error."""
    try:
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_json if finite else None)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(where, f"broken JSON: {place}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(where, f"broken JSON: holds {type(content).__name__}, expected an object")
    return content


def _no_json(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found
