"""Adapted weights on disk: a delta or an adapter, the head, and a manifest that says whose and what for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import NotRequired, TypedDict

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Delta
from recyclable.weights.digest import Digested, file_digest, sha256_file
from recyclable.weights.files import sync, write_json
from recyclable.weights.strict_json import read_json

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
"""SHA-256 (hex) of the manifest, where one was kept."""
CHANGED = "was changed after it was written (its digest is not the recorded one)"
FORMAT = 1
DELTA, HEAD, ADAPTER = "delta.safetensors", "head.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_FILES = {"delta": {DELTA, HEAD}, "adapter": {ADAPTER, ADAPTER_CONFIG}}


_OPEN = ConfigDict(extra="allow", strict=True)


class _Tuning(TypedDict):
    __pydantic_config__ = _OPEN
    tuning: str


class _Task(TypedDict):
    __pydantic_config__ = _OPEN
    name: str
    problem: str
    labels: list[str]


class _Fingerprint(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    weights: str
    tokenizer: str
    config: str


class _Ancestor(TypedDict):
    __pydantic_config__ = _OPEN
    name: str
    fingerprint: _Fingerprint
    declared: NotRequired[bool]


class _Base(TypedDict):
    __pydantic_config__ = _OPEN
    name: str
    fingerprint: _Fingerprint
    ancestors: NotRequired[list[_Ancestor]]


class _Settings(TypedDict):
    __pydantic_config__ = _OPEN
    seed: Annotated[int, Field(ge=0)]
    max_length: Annotated[int, Field(gt=2)]


class _Metrics(TypedDict, total=False):
    __pydantic_config__ = _OPEN
    metric: str
    dev: dict[str, float | None]
    test: dict[str, float | None]
    best_step: float
    examples: float
    seconds: float


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Manifest:
    """What a directory of adapted weights says of itself (`manifest.json`); ValidationError when it is not that."""

    kind: str
    """`delta` (full fine-tuning) or `adapter` (PEFT format)."""
    tuning: _Tuning
    """How the base was tuned: the kind of tuning and its settings."""
    task: _Task
    """name, problem, labels and digest of the task."""
    base: _Base
    """name, fingerprint and recorded ancestors (nearest first) of the base the weights belong to."""
    method: str
    """`tune`, how the weights were recycled, or `import`: tuned elsewhere."""
    metrics: _Metrics
    """Scores on dev and test; empty for weights that came without."""
    history: list[dict[str, Any]]
    """One row per evaluation: step, examples, seconds, dev scores."""
    settings: _Settings
    recycled_from: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Digest (`weights.digest.file_digest`) of every file beside the manifest that belongs to the weights."""
    format: int = FORMAT
    architecture: str | None = None
    """Class of the tuned model in transformers; None is the base's with a sequence-classification head."""
    storage: dict[str, Any] | None = None
    """Of a delta that was encoded from tuned weights: codec, rank, bytes of those weights and what the codec lost."""


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
            if (self.folder / name).resolve().parent != self.folder.resolve():
                raise InputError(self.folder / name, "is a link out of the directory")
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

    def file(self, name: str) -> Digested:
        """One of the safetensors files."""
        return self._files[name]

    def files(self) -> list[Digested]:
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
    found, wanted = (each.manifest.tuning if each.is_adapter else "full" for each in (weights, other))
    if found != wanted:
        raise InputError(weights.folder, f"its tuning is {found}, expected {wanted}{hint}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a directory: digests of its weight files, then the manifest, which marks it as whole."""
    files = {name: file_digest(folder / name) for name in sorted(_FILES[manifest.kind])}
    write_json(folder / MANIFEST, {**manifest.__dict__, "files": files})


def seal(folder: Path) -> None:
    """Keep the manifest's own digest beside it, so that any bit flipped there is noticed too."""
    (folder / SEAL).write_text(sha256_file(folder / MANIFEST) + "\n", encoding="ascii")
    sync(folder / SEAL)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a directory of adapted weights; InputError when it is missing, broken or not the sealed one."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(folder, "is missing, expected a directory of adapted weights")
    if not file.is_file():
        wanted = "expected adapted weights that recyclable wrote; `recyclable store add` takes in others'"
        raise InputError(folder, f"holds no {MANIFEST}, {wanted}")
    content = read_json(file)
    if (folder / SEAL).is_file() and (folder / SEAL).read_bytes() != (sha256_file(file) + "\n").encode():
        raise InputError(file, CHANGED)
    if content.get("format") != FORMAT:
        raise InputError(file, f"format {content.get('format')!r}, this version reads {FORMAT}")
    try:
        manifest = Manifest(**content)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(file, f"broken manifest: {'; '.join(problems)}") from error
    if manifest.kind not in _FILES or set(manifest.files) != _FILES[manifest.kind]:
        raise InputError(file, f"kind {manifest.kind!r} with files {sorted(manifest.files)} is not understood")
    return manifest
