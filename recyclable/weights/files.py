"""Safetensors files that are filled in pieces and any order, and are whole or absent."""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from recyclable.errors import RunError
from recyclable.weights.checkpoint_files import DTYPES, Ranged, Stored
from recyclable.weights.digest import element_pieces, in_threads
from recyclable.weights.durable import sync, write_json
from recyclable.weights.team import ALONE, Team

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape, in the order in which they lie in the file."""
_Read = Callable[[str, int, int], torch.Tensor]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9
"""Where transformers, too, begins another file."""


class SafetensorsWriter:
    """One safetensors file that is filled in pieces; `close` makes it appear under its name.

    Args:
        metadata: strings for the header, beside `format`.
        team: its members fill one file together; opening and closing it are collectives.

    Raises RunError, on every member, where one cannot write, as on a full disk, or does not see the others' files.
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
        self.header = struct.pack("<Q", len(text)) + text
        """The bytes before the first tensor."""
        self._start = len(self.header)
        self._path, self._aside, self._team = path, path.with_name(f".{path.name}.partial"), team
        self._problem: str | None = None
        if team.rank == 0:
            self._try(lambda: self._create(self._start + offset))
        self._agree()
        if team.rank:
            self._try(lambda: self._open(os.O_RDWR))
        self._agree()

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Put a CPU tensor of the announced dtype at elements [start, start + numel) of the flattened tensor."""
        stored = self._stored[name]
        if tensor.dtype != stored.dtype or start + tensor.numel() > stored.numel:
            raise ValueError(f"{self._path}: got {name} {tensor.dtype}, {tensor.numel()} from {start}; not {stored}")
        place = self._start + stored.offset + start * stored.dtype.itemsize
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._try(lambda: self._pwrite(data, place))
        if self._team.size == 1:
            self._agree()

    def _open(self, flags: int) -> None:
        self._file = os.open(self._aside, flags, 0o666)
        self._close = weakref.finalize(self, os.close, self._file)

    def _create(self, size: int) -> None:
        self._open(os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._pwrite(self.header, 0)
        os.ftruncate(self._file, size)

    def _try(self, work: Callable[[], None]) -> None:
        """Do it; what the system says against it is kept until all members hear of it, and nothing is done any more."""
        if self._problem is None:
            try:
                work()
            except FileNotFoundError:
                self._problem = "its directory is gone, or not on a file system that all ranks share"
            except OSError as error:
                self._problem = error.strerror or str(error)

    def _agree(self) -> None:
        """RunError on every member where one had a problem; a collective."""
        if problem := next(filter(None, self._team.gather(self._problem)), None):
            if self._team.rank == 0:
                with suppress(OSError):
                    self._aside.unlink(missing_ok=True)
            raise RunError(self._path, f"cannot be written ({problem})")

    def _pwrite(self, data: bytes | memoryview, place: int) -> None:
        done = 0
        while done < len(data):  # one call writes 2 GiB at most
            done += os.pwrite(self._file, data[done : done + (1 << 30)], place + done)
        if hasattr(os, "posix_fadvise"):  # the disk begins now, not when `close` waits for it
            os.posix_fadvise(self._file, place, len(data), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush to the disk and rename; what was never written is zeros."""
        self._try(lambda: os.fsync(self._file))
        self._agree()
        self._close()
        if self._team.rank == 0:
            self._try(self._appear)
        self._agree()

    def _appear(self) -> None:
        self._aside.replace(self._path)
        sync(self._path.parent)


def write_in_pieces(
    path: Path,
    layout: Layout,
    read: _Read,
    metadata: Mapping[str, str] | None = None,
    team: Team = ALONE,
) -> None:
    """Write a safetensors file, a few pieces of a few MiB in memory at a time; a collective.

    Args:
        read: (name, start, stop) -> elements [start, stop) of the flattened tensor, in the dtype of `layout`.
    """
    _fill(SafetensorsWriter(path, layout, metadata, team), layout, read, team)


def write_as_is(path: Path, tensors: Ranged, team: Team = ALONE) -> None:
    """Write tensors as they are stored, by range; a collective."""
    layout = {name: (tensors.stored(name).dtype, tensors.shape(name)) for name in tensors.names}
    write_in_pieces(path, layout, tensors.read, team=team)


def _fill(
    writer: SafetensorsWriter | CheckpointWriter, layout: Layout, read: _Read, team: Team, label: str | None = None
) -> None:
    pieces = element_pieces({name: shape for name, (_, shape) in layout.items()})
    in_threads(lambda piece: writer.write(piece[0], read(*piece), piece[1]), pieces, label, team=team)
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
    folder: Path,
    tensors: Ranged,
    team: Team = ALONE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str | None = None,
) -> None:
    """Write a model's weights in HF's format as `write_in_pieces` writes a file; a collective.

    Args:
        tensors: by the names that they have in the files.
        label: as for `in_threads`.
    """
    layout = {name: (tensors.stored(name).dtype, tensors.shape(name)) for name in tensors.names}
    _fill(CheckpointWriter(folder, layout, max_shard_bytes, team), layout, tensors.read, team, label)
