"""What a directory of adapted weights says of itself: `manifest.json`, and the seal on it; read without any tensor."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, GetPydanticSchema, ValidationError, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from recyclable.errors import InputError
from recyclable.weights.durable import sync
from recyclable.weights.hashes import sha256_file
from recyclable.weights.locate import inside
from recyclable.weights.own_files import require_own_files
from recyclable.weights.strict_json import read_json

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
"""SHA-256 (hex) of the manifest, where one was kept."""
CHANGED = "was changed after it was written (its digest is not the recorded one)"
FORMAT = 2
_READ = (1, 2)
"""By 1, a tuned model had its base's config and tokenizer, whatever it was tuned with."""
DELTA, HEAD, ADAPTER = "delta.safetensors", "head.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FILES = {"delta": {DELTA, HEAD}, "partial": {DELTA, HEAD}, "adapter": {ADAPTER, ADAPTER_CONFIG}}
GENERATION = "generation_config"
"""The field of a model's config that holds what weights brought along of that file; saved, it is the file again."""


_MAY_BE_A_TOKENIZER_S = re.compile(r"(additional_chat_templates/)?[A-Za-z0-9_][A-Za-z0-9._-]*")


_OPEN = with_config(ConfigDict(extra="allow", strict=True))
_CLOSED = with_config(ConfigDict(extra="forbid", strict=True))


def _like(record: type) -> GetPydanticSchema:
    """Has a dict checked as a TypedDict."""
    return GetPydanticSchema(lambda _, schema_of: schema_of(record))


@_OPEN
class _Tuning(TypedDict):
    tuning: str


@_OPEN
class _Task(TypedDict):
    name: str
    problem: str
    labels: list[str]


@_CLOSED
class _Fingerprint(TypedDict):
    weights: str
    tokenizer: str
    config: str
    chat_template: NotRequired[str | None]


@_OPEN
class _Ancestor(TypedDict):
    name: str
    fingerprint: _Fingerprint
    declared: NotRequired[bool]


@_OPEN
class _Base(TypedDict):
    name: str
    fingerprint: _Fingerprint
    ancestors: NotRequired[list[_Ancestor]]


@_OPEN
class _Settings(TypedDict):
    seed: Annotated[int, Field(ge=0)]
    max_length: Annotated[int, Field(gt=2)] | None


@_CLOSED
class _Tokenizer(TypedDict):
    digest: str
    files: list[str]


@_OPEN
class _Metrics(TypedDict, total=False):
    metric: str
    dev: dict[str, float | None]
    test: dict[str, float | None]
    best_step: float
    examples: float
    seconds: float
    skipped_steps: list[int]
    stopped_early_at: int


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Manifest:
    """What a directory of adapted weights says of itself (`manifest.json`); ValidationError when it is not that."""

    kind: str
    """`delta` (full fine-tuning), `partial` (a delta where some of the base was trained) or `adapter` (PEFT format)."""
    tuning: Annotated[dict[str, Any], _like(_Tuning)]
    """How the base was tuned: the kind of tuning and its settings."""
    task: Annotated[dict[str, Any], _like(_Task)]
    """name, problem, labels and digest of the task."""
    base: Annotated[dict[str, Any], _like(_Base)]
    """name, fingerprint and recorded ancestors (nearest first) of the base the weights belong to."""
    method: str
    """`tune`, how the weights were recycled, or `import`: tuned elsewhere."""
    metrics: Annotated[dict[str, Any], _like(_Metrics)]
    """Scores on dev and test; empty for weights that came without."""
    history: list[dict[str, Any]]
    """One row per evaluation: step, examples, seconds, dev scores."""
    settings: Annotated[dict[str, Any], _like(_Settings)]
    """Among others `max_length`, the tokens that a text is cut at (null: never)."""
    recycled_from: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Digest (`weights.digest.file_digest`) of every file beside the manifest that belongs to the weights."""
    format: int = FORMAT
    architecture: str | None = None
    """Class of the tuned model in transformers; None is the base's with a sequence-classification head."""
    storage: dict[str, Any] | None = None
    """Of a delta that was encoded from tuned weights: codec, rank, bytes of those weights and what the codec lost."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the tuned model's config that change outputs and were not its base's (`architectures.fields`); among
    them `generation_config`, where that file says otherwise than the base's."""
    tokenizer: Annotated[dict[str, Any] | None, _like(_Tokenizer | None)] = None
    """What reads texts for these weights, where it is not the base's tokenizer: digest of how it reads, its files."""

    def files_wanted(self) -> set[str]:
        """The files that belong to the weights beside the manifest."""
        return FILES[self.kind] | set(self.tokenizer["files"] if self.tokenizer else ())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a directory of adapted weights; InputError when it is missing, broken or not the sealed one."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(folder, "is missing, expected a directory of adapted weights")
    if not file.is_file():
        wanted = "expected adapted weights that recyclable wrote; `recyclable store add` takes in others'"
        raise InputError(folder, f"holds no {MANIFEST}, {wanted}{inside(folder, MANIFEST)}")
    require_own_files(folder)
    content = read_json(file)
    if (folder / SEAL).is_file() and (folder / SEAL).read_bytes() != (sha256_file(file) + "\n").encode():
        raise InputError(file, CHANGED)
    if type(found := content.get("format")) is not int or found not in _READ:
        raise InputError(file, f"format {found!r}, this version reads {' and '.join(map(str, _READ))}")
    try:
        manifest = Manifest(**content)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(file, f"broken manifest: {'; '.join(problems)}") from error
    if manifest.kind not in FILES or set(manifest.files) != manifest.files_wanted():
        raise InputError(file, f"kind {manifest.kind!r} with files {sorted(manifest.files)} is not understood")
    for name in manifest.tokenizer["files"] if manifest.tokenizer else ():
        if not _MAY_BE_A_TOKENIZER_S.fullmatch(name) or name in (MANIFEST, SEAL, *FILES[manifest.kind]):
            raise InputError(file, f"tokenizer.files has {name!r}, expected names of a tokenizer's files beside it")
    if (manifest.kind == "delta") != (manifest.tuning["tuning"] == "full"):
        raise InputError(file, f"kind {manifest.kind!r} with tuning {manifest.tuning['tuning']!r} is not understood")
    return manifest


def seal(folder: Path) -> None:
    """Keep the manifest's own digest beside it, so that any bit flipped there is noticed too."""
    (folder / SEAL).write_text(sha256_file(folder / MANIFEST) + "\n", encoding="ascii")
    sync(folder / SEAL)
