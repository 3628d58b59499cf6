"""`lineage.json`: which base an upgraded base came from, and what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recyclable.errors import InputError

FILE = "lineage.json"


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage recorded in a base's directory, None for a base without one (a root)."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        lineage = json.loads(file.read_text(encoding="utf-8"))
        for base in (lineage, *lineage["ancestors"]):
            base["fingerprint"]["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(file, "broken, expected JSON with fingerprint and ancestors") from error
    return lineage


def ancestors_for_child(parent: Path, name: str, parent_fingerprint: dict[str, str]) -> list[dict[str, Any]]:
    """The ancestors a child of `parent` has: the parent first, then the parent's own.

    A lineage that was written for other weights than the parent's says nothing about it.
    """
    lineage = read_lineage(parent)
    known = lineage is not None and lineage["fingerprint"]["weights"] == parent_fingerprint["weights"]
    return [{"name": name, "fingerprint": parent_fingerprint}, *(lineage["ancestors"] if known else [])]


def descends(folder: Path, own_weights: str, ancestor_weights: str) -> bool:
    """Whether the base in `folder` is the ancestor itself or has it in its recorded lineage.

    The lineage counts only for the weights it was written for.
    """
    if own_weights == ancestor_weights:
        return True
    lineage = read_lineage(folder)
    if lineage is None or lineage["fingerprint"]["weights"] != own_weights:
        return False
    return any(a["fingerprint"]["weights"] == ancestor_weights for a in lineage["ancestors"])
