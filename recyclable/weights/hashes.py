"""Digests of whole files and of JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from blake3 import blake3


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed (hex)."""
    return _of_file(path, hashlib.sha256())


def blake3_file(path: Path) -> str:
    """BLAKE3 of a file's bytes, streamed (hex): about three times as fast."""
    return _of_file(path, blake3())


def _of_file(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (hex)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
