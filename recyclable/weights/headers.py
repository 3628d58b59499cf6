"""Headers of safetensors files, checked and read without any tensor; pickles are refused, never opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from recyclable.errors import InputError
from recyclable.weights.strict_json import parse_json


@dataclass(frozen=True)
class Header:
    """What stands before the first tensor of a file."""

    raw: bytes
    """All of it, the length in front included."""
    tensors: dict[str, dict[str, Any]]
    """Name -> `dtype` (the format's name), `shape`, `data_offsets` (behind the header)."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises InputError when the file is missing, is a pickle, or its header does not hold together (the safetensors
    library's own checks: sizes, offsets without holes or overlaps, nothing behind the last tensor).
    """
    if not path.is_file():
        raise InputError(path, "is missing, expected a safetensors file")
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:
            length = file.read(8)
            raw = length + file.read(int.from_bytes(length, "little"))
    except (SafetensorError, OSError) as error:
        problem = f"is not a valid safetensors file ({error}); pickles are never loaded"
        raise InputError(path, problem) from error
    content = parse_json(raw[8:].decode(), path)
    metadata = content.pop("__metadata__", None) or {}
    return Header(raw, content, metadata)
