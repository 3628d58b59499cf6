"""Files that are whole or absent: written aside, synced, renamed; safetensors in pieces and any order."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import DTYPES, Stored
from recyclable.weights.digest import element_pieces, in_threads
from recyclable.weights.team import ALONE, Team

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
    """A directory aside to fill; synced, it becomes `folder` at the end, or is removed when the body fails.

    Raises FileExistsError when `folder` exists and is not empty; of several who make it at once, the first wins.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(folder)
    made = [parent for parent in folder.parents if not parent.exists()]
    aside = folder.with_name(f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        try:
            aside.rename(folder)  # replaces an empty directory
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(folder) from error
            raise
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # somebody else has begun to use it
            for parent in made:
                parent.rmdir()
        raise


def clear_leftovers(parent: Path) -> None:
    """Remove what writers of `new_directory` left aside in a directory when they died on this host."""
    for aside in parent.glob(".*.partial-*"):
        writer = re.fullmatch(rf"\..*\.partial-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+", aside.name)
        if writer and not _alive(int(writer[1])):
            shutil.rmtree(aside, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


class SafetensorsWriter:
    """One safetensors file that is filled in pieces; `close` makes it appear under its name.

    Args:
        metadata: strings for the header, beside `format`.
        team: its members fill one file together; opening and closing it are collectives.

    Raises InputError when the members do not see one another's files.
    """

    def __init__(
        self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None, team: Team = ALONE
    ) -> None:
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
        self._path, self._aside, self._team = path, path.with_name(f".{path.name}.partial"), team
        if team.rank == 0:
            self._file = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._pwrite(struct.pack("<Q", len(text)) + text, 0)
            os.ftruncate(self._file, self._start + offset)
        team.gather(None)
        if team.rank:
            try:
                self._file = os.open(self._aside, os.O_RDWR)
            except FileNotFoundError as error:
                raise InputError(path.parent, "is not on a file system that all ranks share") from error

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
        if hasattr(os, "posix_fadvise"):  # the disk begins now, not when `close` waits for it
            os.posix_fadvise(self._file, place, len(data), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush to the disk and rename; what was never written is zeros."""
        os.fsync(self._file)
        os.close(self._file)
        self._team.gather(None)
        if self._team.rank == 0:
            self._aside.replace(self._path)
            sync(self._path.parent)
        self._team.gather(None)


def write_in_pieces(
    path: Path,
    layout: Layout,
    read: Callable[[str, int, int], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    team: Team = ALONE,
) -> None:
    """Write a safetensors file, a few pieces of a few MiB in memory at a time; a collective.

    Args:
        read: (name, start, stop) -> elements [start, stop) of the flattened tensor, in the dtype of `layout`.
    """
    _fill(SafetensorsWriter(path, layout, metadata, team), layout, read, team)


def _fill(writer: SafetensorsWriter | CheckpointWriter, layout: Layout, read: Callable, team: Team) -> None:
    pieces = element_pieces({name: shape for name, (_, shape) in layout.items()})
    in_threads(lambda piece: writer.write(piece[0], read(*piece), piece[1]), pieces, team=team)
    writer.close()


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

    def __init__(
        self, folder: Path, layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES, team: Team = ALONE
    ) -> None:
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
        self._team = team
        self._writers = {f: SafetensorsWriter(folder / f, s, None, team) for f, s in zip(files, shards, strict=True)}

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """As `SafetensorsWriter.write`."""
        self._writers[self._file_of[name]].write(name, tensor, start)

    def close(self) -> None:
        """Complete every file, then the index."""
        for writer in self._writers.values():
            writer.close()
        if len(self._writers) > 1 and self._team.rank == 0:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
            write_json(self._folder / "model.safetensors.index.json", index)


def write_checkpoint(
    folder: Path, layout: Layout, read: Callable[[str, int, int], torch.Tensor], team: Team = ALONE
) -> None:
    """Write a model's weights in HF's format as `write_in_pieces` writes a file; a collective."""
    _fill(CheckpointWriter(folder, layout, team=team), layout, read, team)
