"""Adapted weights on disk: a delta or an adapter, the head, and a manifest that says whose and what for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Delta
from recyclable.weights.digest import Digested, file_digest
from recyclable.weights.durable import copy_files, write_json
from recyclable.weights.hashes import sha256_file
from recyclable.weights.manifest import (
    ADAPTER_CONFIG,
    CHANGED,
    DELTA,
    GENERATION,
    HEAD,
    MANIFEST,
    Manifest,
    read_manifest,
)
from recyclable.weights.strict_json import read_json


class AdaptedWeights:
    """A directory of adapted weights, opened and verified; tensors are read on demand."""

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """Raises InputError when the manifest is missing or broken, or a file is not the one it was written for.

        Args:
            verify: False leaves that to `verify`, after the reading, which then hashes only what was not read.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._files: dict[str, Digested[SafetensorsFile]] = {}
        for name in self.manifest.files:
            if not (self.folder / name).is_file():
                raise InputError(self.folder / name, "is missing, but the manifest lists it")
            if name.endswith(".safetensors"):
                self._files[name] = Digested(SafetensorsFile(self.folder / name))
        if verify:
            self.verify()

    def changed(self) -> list[str]:
        """Names of the files that are not those the manifest was written for; reads what was not read yet."""

        def digest(name: str) -> str:
            return self._files[name].file_digest() if name in self._files else sha256_file(self.folder / name)

        return [name for name, written in self.manifest.files.items() if digest(name) != written]

    def verify(self) -> None:
        """Raise InputError when a file is not the one the manifest was written for."""
        for name in self.changed():
            raise InputError(self.folder / name, CHANGED)

    @property
    def head_bytes(self) -> int:
        """Bytes of the tensors that the base lacks; only where these are no adapter."""
        return sum(self._files[HEAD].stored(name).nbytes for name in self._files[HEAD].names)

    @property
    def is_adapter(self) -> bool:
        """Whether these are an adapter's weights rather than a delta of all weights."""
        return self.manifest.kind == "adapter"

    @property
    def tokenizer(self) -> Path | None:
        """The directory of the tokenizer that reads texts for these weights; None where it is the base's own."""
        return self.folder if self.manifest.tokenizer else None

    def copy_tokenizer(self, into: Path) -> None:
        """Copy the files of a tokenizer of its own, if any."""
        copy_files(self.folder, into, self.manifest.tokenizer["files"] if self.manifest.tokenizer else ())

    @property
    def prompts(self) -> int:
        """How many positions before a text these weights take for prompts of their own."""
        return read_json(self.folder / ADAPTER_CONFIG).get("num_virtual_tokens") or 0 if self.is_adapter else 0

    def file(self, name: str) -> Digested[SafetensorsFile]:
        """One of the safetensors files."""
        return self._files[name]

    def files(self) -> list[Digested[SafetensorsFile]]:
        """All of them."""
        return list(self._files.values())

    @cached_property
    def delta(self) -> Delta:
        """The differences; only where these are no adapter."""
        return Delta(self._files[DELTA])

    def tensors(self, file: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of one of the files, one at a time."""
        return self._files[file].items()


def require_same_tuning(weights: AdaptedWeights, other: AdaptedWeights, hint: str = "") -> None:
    """InputError where weights were not tuned as the others were: an adapter of the same settings, or in full."""
    found, wanted = (_given(each.manifest) for each in (weights, other))
    if found != wanted:
        raise InputError(weights.folder, f"its tuning is {found}, expected {wanted}{hint}")


def _given(manifest: Manifest) -> dict[str, Any] | str:
    """The tuning without settings that are off: weights that know nothing of them were tuned so as well."""
    return "full" if manifest.kind == "delta" else {name: value for name, value in manifest.tuning.items() if value}


def require_same_model(weights: AdaptedWeights, other: AdaptedWeights) -> None:
    """InputError where weights were tuned in a model that computes, or reads, otherwise than the others' did."""
    own, theirs = weights.manifest, other.manifest
    fields = sorted({name for name, _ in _items(own.config) ^ _items(theirs.config)} - {GENERATION})
    if own.tokenizer != theirs.tokenizer:
        fields.append("tokenizer")
    if fields:
        problem = f"was tuned with another {', '.join(fields)} than {other.folder}: one model cannot be both"
        raise InputError(weights.folder, problem)


def _items(fields: dict[str, Any]) -> set[tuple[str, str]]:
    return {(name, json.dumps(value, sort_keys=True)) for name, value in fields.items()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a directory: digests of its files, then the manifest, which marks it as whole."""
    files = {name: file_digest(folder / name) for name in sorted(manifest.files_wanted())}
    write_json(folder / MANIFEST, {**manifest.__dict__, "files": files})
