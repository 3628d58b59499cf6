"""Adapted weights on disk: a delta or an adapter, the head, and a manifest that says whose and what for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Delta
from recyclable.weights.digest import Digested, file_digest, sha256_file
from recyclable.weights.files import write_json

MANIFEST = "manifest.json"
FORMAT = 1
DELTA, HEAD, ADAPTER = "delta.safetensors", "head.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_FILES = {"delta": {DELTA, HEAD}, "adapter": {ADAPTER, ADAPTER_CONFIG}}


@dataclass(frozen=True)
class Manifest:
    """What a directory of adapted weights says of itself (`manifest.json`)."""

    kind: str
    """`delta` (full fine-tuning) or `adapter` (PEFT format)."""
    tuning: dict[str, Any]
    """How the base was tuned: the kind of tuning and its settings."""
    task: dict[str, Any]
    """name, problem, labels and digest of the task."""
    base: dict[str, Any]
    """name and fingerprint of the base the weights belong to."""
    method: str
    """`tune`, or how the weights were recycled."""
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    """One row per evaluation: step, examples, seconds, dev scores."""
    settings: dict[str, Any]
    recycled_from: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Digest (`weights.digest.file_digest`) of every file beside the manifest that belongs to the weights."""
    format: int = FORMAT


class AdaptedWeights:
    """A directory of adapted weights, opened and verified; tensors are read on demand."""

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """Raises InputError when the manifest is missing or broken, or a file is not the one it was written for.

        Args:
            verify: False leaves that to `verify`, after the reading, which then hashes only what was not read.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._files: dict[str, Digested] = {}
        for name in self.manifest.files:
            if not (self.folder / name).is_file():
                raise InputError(self.folder / name, "is missing, but the manifest lists it")
            if name.endswith(".safetensors"):
                self._files[name] = Digested(SafetensorsFile(self.folder / name))
        if verify:
            self.verify()

    def verify(self) -> None:
        """Raise InputError when a file is not the one the manifest was written for; reads what was not read yet."""
        for name, digest in self.manifest.files.items():
            opened = self._files.get(name)
            if (opened.file_digest() if opened else sha256_file(self.folder / name)) != digest:
                raise InputError(
                    self.folder / name, "was changed after it was written (its digest is not the manifest's)"
                )

    @property
    def is_adapter(self) -> bool:
        """Whether these are an adapter's weights rather than a delta of all weights."""
        return self.manifest.kind == "adapter"

    def file(self, name: str) -> Digested:
        """One of the safetensors files."""
        return self._files[name]

    @cached_property
    def delta(self) -> Delta:
        """The differences; only where these are no adapter."""
        return Delta(self._files[DELTA])

    def tensors(self, file: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of one of the files, one at a time."""
        return self._files[file].items()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a directory: digests of its weight files, then the manifest, which marks it as whole."""
    files = {name: file_digest(folder / name) for name in sorted(_FILES[manifest.kind])}
    write_json(folder / MANIFEST, {**manifest.__dict__, "files": files})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a directory of adapted weights; InputError when it is missing or broken."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(folder, "is missing, expected a directory of adapted weights")
    if not file.is_file():
        raise InputError(folder, f"holds no {MANIFEST}, expected adapted weights that recyclable wrote")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        manifest = Manifest(**content)
        if manifest.format != FORMAT:
            raise InputError(file, f"format {manifest.format!r}, this version reads {FORMAT}")
        if manifest.kind not in _FILES or set(manifest.files) != _FILES[manifest.kind]:
            raise InputError(file, f"kind {manifest.kind!r} with files {sorted(manifest.files)} is not understood")
        str(manifest.base["fingerprint"]["weights"]), list(manifest.task["labels"]), str(manifest.tuning["tuning"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(file, f"broken manifest: {error}") from error
    return manifest
