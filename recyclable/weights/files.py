"""Files that are whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def sync(path: Path) -> None:
    """Flush a file or directory entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a safetensors file one tensor at a time; only one is in memory.

    Args:
        shapes: dtype and shape of every tensor, in the order in which `tensors` yields them.
        tensors: (name, CPU tensor) pairs.

    Raises:
        ValueError: a tensor comes out of order, or is not what `shapes` announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    aside = path.with_name(f".{path.name}.partial")
    expected = iter(shapes.items())
    with aside.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            want = next(expected, None)
            if want != (name, (tensor.dtype, tuple(tensor.shape))):
                raise ValueError(f"{path}: got {name} {tensor.dtype} {tuple(tensor.shape)}, announced was {want}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        if (want := next(expected, None)) is not None:
            raise ValueError(f"{path}: {want[0]} was announced and never came")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors that are in memory already."""
    write_safetensors(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())
