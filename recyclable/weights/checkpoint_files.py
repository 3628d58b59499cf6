"""Reads a model directory's safetensors lazily, tensor by tensor; pickles are refused, never opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from recyclable.errors import InputError

_PICKLES = ("*.bin", "*.pt", "*.pth")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_safetensors(path: Path) -> safe_open:
    """Map one file; InputError when it is missing, is a pickle, or its header does not hold together."""
    if not path.is_file():
        raise InputError(path, "is missing, expected a safetensors file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is not a valid safetensors file ({error}); pickles are never loaded") from error


def tensors_in(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one safetensors file, by name, read one at a time."""
    file = open_safetensors(path)
    for name in sorted(file.keys()):
        yield name, file.get_tensor(name)


class TensorFiles:
    """The tensors of an HF model directory, one file or many, by the names that stand in the files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._where: dict[str, str] = {}
        for file in self._file_names():
            self._files[file] = open_safetensors(self.folder / file)
            self._where.update(dict.fromkeys(self._files[file].keys(), file))

    def _file_names(self) -> list[str]:
        if (self.folder / _SINGLE).is_file():
            return [_SINGLE]
        index = self.folder / _INDEX
        if not index.is_file():
            pickles = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
            found = f"only found {', '.join(pickles)} (pickle, never loaded)" if pickles else "no weights found"
            raise InputError(self.folder, f"{found}; expected {_SINGLE} or {_INDEX}")
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(index, "broken, expected JSON with a weight_map of tensor names to files") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(index, f"weight_map points to {name!r}, expected a file beside the index")
        return names

    @cached_property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, read now, in its stored dtype, on the CPU."""
        return self._files[self._where[name]].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one after the other."""
        return ((name, self[name]) for name in self.names)
