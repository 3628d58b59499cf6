"""Files that are whole or absent: written aside, synced, renamed; safetensors in pieces and any order."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recyclable.weights.checkpoint_files import DTYPES, Stored

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape, in the order in which they lie in the file."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9
"""Where transformers, too, begins another file."""


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


@contextmanager
def new_directory(folder: Path) -> Iterator[Path]:
    """A directory aside to fill; it becomes `folder` at the end, or is removed when the body fails.

    Raises FileExistsError when `folder` exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    aside.mkdir()
    try:
        yield aside
        sync(aside)
        aside.rename(folder)  # replaces an empty directory
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class SafetensorsWriter:
    """One safetensors file that is filled in pieces; `close` makes it appear under its name.

    Args:
        metadata: strings for the header, beside `format`.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._stored: dict[str, Stored] = {}
        offset = 0
        for name, (dtype, shape) in layout.items():
            self._stored[name] = Stored(dtype, tuple(shape), offset)
            end = offset + self._stored[name].nbytes
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
        self._start = 8 + len(text)
        self._path, self._aside = path, path.with_name(f".{path.name}.partial")
        self._file = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._pwrite(struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(self._file, self._start + offset)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Put a CPU tensor of the announced dtype at elements [start, start + numel) of the flattened tensor."""
        stored = self._stored[name]
        if tensor.dtype != stored.dtype or start + tensor.numel() > stored.numel:
            raise ValueError(f"{self._path}: got {name} {tensor.dtype}, {tensor.numel()} from {start}; not {stored}")
        place = self._start + stored.offset + start * stored.dtype.itemsize
        self._pwrite(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()), place)

    def _pwrite(self, data: bytes | memoryview, place: int) -> None:
        done = 0
        while done < len(data):  # one call writes 2 GiB at most
            done += os.pwrite(self._file, data[done : done + (1 << 30)], place + done)

    def close(self) -> None:
        """Flush to the disk and rename; what was never written is zeros."""
        os.fsync(self._file)
        os.close(self._file)
        self._aside.replace(self._path)
        sync(self._path.parent)


def write_safetensors(
    path: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file one tensor at a time; only one is in memory.

    Args:
        layout: dtype and shape of every tensor, in the order in which `tensors` yields them.
        tensors: (name, CPU tensor) pairs.

    Raises:
        ValueError: a tensor comes out of order, or is not what `layout` announced.
    """
    writer, expected = SafetensorsWriter(path, layout, metadata), iter(layout.items())
    for name, tensor in tensors:
        want = next(expected, None)
        if want != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(f"{path}: got {name} {tensor.dtype} {tuple(tensor.shape)}, announced was {want}")
        writer.write(name, tensor)
    if (want := next(expected, None)) is not None:
        raise ValueError(f"{path}: {want[0]} was announced and never came")
    writer.close()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory already."""
    write_safetensors(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items(), metadata)


class CheckpointWriter:
    """A model's weights in HF's format: one `model.safetensors`, or several with an index."""

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
        filled = self._total = 0
        for name, (dtype, shape) in layout.items():
            size = Stored(dtype, tuple(shape)).nbytes
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = (dtype, tuple(shape))
            filled, self._total = filled + size, self._total + size
        files = ["model.safetensors"]
        if len(shards) > 1:
            files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._folder = folder
        self._file_of = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        self._writers = {f: SafetensorsWriter(folder / f, shard) for f, shard in zip(files, shards, strict=True)}

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """As `SafetensorsWriter.write`."""
        self._writers[self._file_of[name]].write(name, tensor, start)

    def close(self) -> None:
        """Complete every file, then the index."""
        for writer in self._writers.values():
            writer.close()
        if len(self._writers) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
            write_json(self._folder / "model.safetensors.index.json", index)
