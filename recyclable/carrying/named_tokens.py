"""Tokens that fields of a config name by their rows (padding, end ...), on a vocabulary that has them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recyclable.weights.vocabulary import Rows

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def names_tokens(fields: Mapping[str, Any]) -> bool:
    """Whether any field, or one inside a field, names tokens."""
    return any(_is_tokens(name) or (isinstance(value, dict) and names_tokens(value)) for name, value in fields.items())


def with_moved_tokens(fields: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """The fields on the new vocabulary; a token that is gone is no longer named."""
    new_row = {int(old): row for row, old in enumerate(rows.old_row) if old >= 0}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [found for found in map(moved, value) if found not in (None, [])]
        return new_row.get(value) if type(value) is int else value

    found: dict[str, Any] = {}
    for name, value in fields.items():
        if not _is_tokens(name):
            found[name] = with_moved_tokens(value, rows) if isinstance(value, dict) else value
        elif value is None or (kept := moved(value)) not in (None, []):
            found[name] = value if value is None else kept
    return found


def _is_tokens(name: str) -> bool:
    return name.endswith("_token_id") or name in _LISTS
