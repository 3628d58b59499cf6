"""Teacher outputs kept by example: in memory, or in files that jobs share; computed once, used in every epoch.

A frozen teacher without dropout says the same of the same tokens every time, so a cached answer is exact.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recyclable.data.examples import Batch, TaskExamples
from recyclable.data.order import Item
from recyclable.errors import InputError
from recyclable.objectives.teachers import SIGNAL_PREFIX
from recyclable.weights.checkpoint_files import InMemory, SafetensorsFile, Source
from recyclable.weights.durable import missing_directories, remove_empty, write_json
from recyclable.weights.files import write_tensors
from recyclable.weights.hashes import sha256_file, sha256_json

_FORMAT = 1  # part of every key: raise it when the same teacher would be kept differently
_KEY, _EXAMPLES = "key.json", "examples"
Rows = dict[str, torch.Tensor]
"""Name -> [examples, ...]"""


class TeacherCache:
    """Rows of tensors by the digest of an example's tokens.

    On disk a folder holds the outputs of one teacher with one set of settings: safetensors files named by their own
    SHA-256, written aside and renamed, so that any number of jobs may add and read at once and a damaged file is
    known by its name. Only the rows that are asked for are read.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any] | None = None) -> None:
        """`folder` None keeps everything in memory; else it is made, and told its key, for the first rows to keep."""
        self._folder, self._key = folder, key
        self._where: dict[bytes, tuple[Source, int]] = {}
        self._read: set[str] = set()

    def missing(self, examples: Iterable[bytes]) -> list[bytes]:
        """The examples that are not there, each once."""
        return [example for example in dict.fromkeys(examples) if example not in self._where]

    def rows(self, examples: list[bytes]) -> Rows:
        """Name -> [len(examples), ...], in this order."""
        found = [self._where[example] for example in examples]
        names = [name for name in found[0][0].names if name != _EXAMPLES]
        return {name: torch.stack([_row(rows, name, place) for rows, place in found]) for name in names}

    def keep(self, examples: list[bytes], rows: Rows, writes: bool = True) -> None:
        """Add examples: in memory at once; in a directory a file, which one process `writes` and `read` finds."""
        if self._folder is None:
            kept = InMemory(rows)
            self._where.update({example: (kept, place) for place, example in enumerate(examples)})
        elif writes:
            digests = torch.frombuffer(bytearray(b"".join(examples)), dtype=torch.uint8).view(len(examples), -1)
            made, aside = missing_directories(self._folder), self._folder / f"{uuid.uuid4().hex}.aside"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_tensors(aside, {_EXAMPLES: digests, **rows})
                os.replace(aside, self._folder / f"{sha256_file(aside)}.safetensors")
                write_json(aside, self._key)
                os.replace(aside, self._folder / _KEY)
            except BaseException as error:
                for left in self._folder.glob(f"*{aside.name}*"):
                    left.unlink(missing_ok=True)
                remove_empty(made)
                if isinstance(error, OSError):
                    raise InputError("teacher_cache", f"{self._folder} cannot be used: {error.strerror}") from error
                raise

    def files(self) -> tuple[list[str], list[Path]]:
        """Names of the files that are whole; and the files that are damaged, which it removes."""
        whole, damaged = [], []
        for path in sorted(self._folder.glob("*.safetensors")) if self._folder else ():
            if path.name in self._read or sha256_file(path) == path.stem:
                whole.append(path.name)
            else:
                damaged.append(path)
                path.unlink(missing_ok=True)
        return whole, damaged

    def read(self, names: list[str]) -> None:
        """Open files that `files` found whole; InputError where they are not to be seen, as from another host."""
        if self._folder is None:
            return
        for name in set(names) - self._read:
            try:
                rows = SafetensorsFile(self._folder / name)
            except (OSError, InputError) as error:
                problem = f"{self._folder / name} cannot be read on every host, expected a directory that all share"
                raise InputError("teacher_cache", problem) from error
            for place, example in enumerate(rows[_EXAMPLES].numpy()):
                self._where[example.tobytes()] = rows, place
            self._read.add(name)


def _row(rows: Source, name: str, place: int) -> torch.Tensor:
    shape = rows.shape(name)[1:]
    width = math.prod(shape)
    return rows.read(name, place * width, (place + 1) * width).view(shape)


class TaughtExamples:
    """Labelled texts whose batches bring a teacher's outputs along.

    Args:
        used: the examples whose answers are kept; there are no batches of others.
    """

    def __init__(self, examples: TaskExamples, cache: TeacherCache, used: Sequence[int]) -> None:
        self._examples, self._cache, self.used = examples, cache, used
        self.labels, self.lengths = examples.labels, examples.lengths
        self.digest = examples.digest

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, items: list[Item]) -> Batch:
        told = self._cache.rows([self._examples.digest(index) for _, index in items])
        return {**self._examples.batch(items), **{SIGNAL_PREFIX + name: rows for name, rows in told.items()}}


def open_cache(root: Path, key: Mapping[str, Any]) -> tuple[TeacherCache, str | None]:
    """The cache under `root` for outputs under this key.

    Returns also what a person should know where it is new: that others are there, and in what the likest one differs.
    """
    key = json.loads(json.dumps({"format": _FORMAT, **key}, default=str))
    folder, stale = root / sha256_json(key)[:16], None
    try:
        others = [] if folder.is_dir() else [_other_key(path) for path in sorted(root.glob(f"*/{_KEY}"))]
    except OSError as error:
        raise InputError("teacher_cache", f"{root} cannot be used: {error.strerror}") from error
    if others:
        differing = min(([n for n in key if other.get(n) != key[n]] for other in others), key=len)
        stale = f"{root} holds outputs for other {', '.join(differing)}: they are not used, new ones are computed"
    return TeacherCache(folder, key), stale


def _other_key(path: Path) -> dict[str, Any]:
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return key if isinstance(key, dict) else {}
