"""Fingerprints of bases, remembered from when they were computed last: for what is only told, never for a decision.

A record holds as long as no file of the base has changed in name, size, times or place on the disk.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.weights.chat_template import FOLDER
from recyclable.weights.durable import write_json
from recyclable.weights.hashes import sha256_json
from recyclable.weights.lineage import is_fingerprint
from recyclable.weights.strict_json import read_json

VARIABLE = "RECYCLABLE_CACHE"
_RULE = 4  # raise it when fingerprints are made otherwise
_BESIDE = ("lineage.json",)  # says where a base comes from, not what it is


def stamp(folder: Path) -> str:
    """What changes when any file of a directory does."""
    paths = [*folder.iterdir(), *(folder / FOLDER).glob("*.jinja")]
    files = sorted(path for path in paths if path.is_file() and path.name not in _BESIDE)
    stats = [(path.name, path.stat()) for path in files]
    return sha256_json([_RULE, [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats]])


def recall(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of a base as it was computed last, None where that is not known any more."""
    try:
        record = read_json(_file(folder))
    except InputError:
        return None
    known = record.get("fingerprint")
    return known if record.get("stamp") == stamp(folder) and is_fingerprint(known) else None


def remember(folder: Path, stamp_before: str, fingerprint: dict[str, Any]) -> None:
    """Keep a fingerprint for `recall`; a cache that cannot be written is none.

    Args:
        stamp_before: the directory's `stamp` from before its files were read.
    """
    if stamp(folder) != stamp_before:
        return
    try:
        _file(folder).parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(folder), {"folder": str(folder.resolve()), "stamp": stamp_before, "fingerprint": fingerprint})
    except OSError:
        pass


def _file(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recyclable"
    root = Path(os.environ.get(VARIABLE) or cache)
    return root / "fingerprints" / f"{sha256_json(str(folder.resolve()))[:32]}.json"
