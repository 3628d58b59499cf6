"""Reads safetensors by tensor and by byte range; headers are checked first, pickles are refused, never opened."""

from __future__ import annotations

import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from recyclable.errors import InputError
from recyclable.weights.headers import read_header
from recyclable.weights.locate import inside
from recyclable.weights.strict_json import read_json

_MAX_ELEMENTS = 1 << 62  # of a shape whose zeros are left out, so that torch can count them
_PICKLES = ("*.bin", "*.pt", "*.pth")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    """Its first byte in the file."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * self.dtype.itemsize


class Ranged(ABC):
    """Named tensors that can be read by range of their elements."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors."""

    @abstractmethod
    def stored(self, name: str) -> Stored:
        """Dtype and shape of a tensor, and where it lies."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in its stored dtype, as a new flat CPU tensor."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """One whole tensor, read now, in its stored dtype, on the CPU."""
        return self.read(name).view(self.stored(name).shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return self.stored(name).shape

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one after the other, by name."""
        return ((name, self[name]) for name in sorted(self.names))


class Source(Ranged):
    """Named tensors that can be read by byte range, and so by elements."""

    @abstractmethod
    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8."""

    def origin(self, name: str) -> tuple[object, str]:
        """What messages name for a tensor: the file that it lies in, and what it is called there."""
        return "weights", name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in its stored dtype, as a new flat CPU tensor."""
        stored = self.stored(name)
        size = stored.dtype.itemsize
        data = self.read_bytes(name, start * size, (stored.numel if stop is None else stop) * size)
        return torch.from_numpy(data).view(stored.dtype) if len(data) else torch.empty(0, dtype=stored.dtype)


class SafetensorsFile(Source):
    """One safetensors file; `header` are the bytes before its first tensor. Raises InputError as `read_header`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.header, self.metadata, content = header.raw, header.metadata, header.tensors
        start = len(header.raw)
        unknown = sorted({entry["dtype"] for entry in content.values()} - DTYPES.keys())
        if unknown:
            raise InputError(self.path, f"holds tensors of dtype {', '.join(unknown)}, expected one of {list(DTYPES)}")
        vast = [name for name, entry in content.items() if math.prod(n or 1 for n in entry["shape"]) > _MAX_ELEMENTS]
        if vast:
            raise InputError(self.path, f"{vast[0]} is {tuple(content[vast[0]]['shape'])}, larger than any tensor")
        self._stored = {
            name: Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in content.items()
        }

    @cached_property
    def names(self) -> list[str]:
        """Names of all tensors, in the order in which they lie in the file."""
        return sorted(self._stored, key=lambda name: (self._stored[name].offset, name))

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def stored(self, name: str) -> Stored:
        """Dtype, shape and place of a tensor."""
        return self._stored[name]

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8."""
        data = np.empty(stop - start, np.uint8)
        done, first = 0, self._stored[name].offset + start
        while done < len(data):  # one call reads 2 GiB at most
            got = os.preadv(self._file, [data[done : done + (1 << 30)].data], first + done)
            if got == 0:
                raise InputError(self.path, f"ends within {name}: it was cut short after it was opened")
            done += got
        return data

    def origin(self, name: str) -> tuple[object, str]:
        """This file."""
        return self.path, name


class InMemory(Source):
    """Tensors that are in memory already, on any device."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def stored(self, name: str) -> Stored:
        """Dtype and shape of a tensor."""
        return Stored(self._tensors[name].dtype, tuple(self._tensors[name].shape))

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8; the tensor's own memory where it can be."""
        return self._tensors[name].detach().reshape(-1).view(torch.uint8)[start:stop].cpu().numpy()


class Computed(Ranged):
    """Tensors that are computed range by range as they are asked for.

    Args:
        layout: name -> dtype and shape, in the order of the names.
        read: (name, start, stop) -> elements [start, stop) of the flattened tensor, flat, in that dtype.
    """

    def __init__(
        self,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        read: Callable[[str, int, int], torch.Tensor],
    ) -> None:
        self._layout, self._read = layout, read

    @property
    def names(self) -> list[str]:
        """Those of the layout, in its order."""
        return list(self._layout)

    def stored(self, name: str) -> Stored:
        """Dtype and shape; it lies nowhere."""
        return Stored(*self._layout[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self._read(name, start, self.stored(name).numel if stop is None else stop)


class Renamed(Source):
    """Some tensors of a source under other names.

    Args:
        stored_name: name here -> name there.
    """

    def __init__(self, source: Source, stored_name: dict[str, str]) -> None:
        self.source, self.stored_name = source, stored_name

    @property
    def names(self) -> list[str]:
        """The names here, sorted."""
        return sorted(self.stored_name)

    def __contains__(self, name: str) -> bool:
        return name in self.stored_name

    def stored(self, name: str) -> Stored:
        """Dtype, shape and place of a tensor."""
        return self.source.stored(self.stored_name[name])

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8."""
        return self.source.read_bytes(self.stored_name[name], start, stop)

    def origin(self, name: str) -> tuple[object, str]:
        """The source's."""
        return self.source.origin(self.stored_name[name])


class TensorFiles(Source):
    """The tensors of an HF model directory, one file or many, by the names that stand in the files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._where: dict[str, SafetensorsFile] = {}
        for name, listed in self._files().items():
            file = SafetensorsFile(self.folder / name)
            if absent := sorted(set(listed) - set(file.names)):
                raise InputError(file.path, f"lacks {', '.join(absent)}, which {_INDEX} says it holds")
            twice = sorted(self._where.keys() & file.names)
            if twice:
                raise InputError(file.path, f"holds {twice[0]}, which {self._where[twice[0]].path.name} holds as well")
            self._where.update(dict.fromkeys(file.names, file))

    def _files(self) -> dict[str, list[str]]:
        """File -> the tensors that an index says it holds."""
        if (self.folder / _SINGLE).is_file():
            return {_SINGLE: []}
        index = self.folder / _INDEX
        if not index.is_file():
            pickles = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
            found = f"only found {', '.join(pickles)} (pickle, never loaded)" if pickles else "no weights found"
            hint = inside(self.folder, _SINGLE, _INDEX)
            raise InputError(self.folder, f"{found}; expected {_SINGLE} or {_INDEX}{hint}")
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise InputError(index, "broken, expected JSON with a weight_map of tensor names to files")
        files: dict[str, list[str]] = {}
        for tensor, name in where.items():
            if not isinstance(name, str) or Path(name).name != name or name == ".." or "\0" in name:
                raise InputError(index, f"weight_map points to {name!r}, expected a file beside the index")
            files.setdefault(name, []).append(tensor)
        return dict(sorted(files.items()))

    @cached_property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def stored(self, name: str) -> Stored:
        """Dtype, shape and place of a tensor."""
        return self._where[name].stored(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8."""
        return self._where[name].read_bytes(name, start, stop)

    def origin(self, name: str) -> tuple[object, str]:
        """The file of several that it lies in."""
        return self._where[name].origin(name)
