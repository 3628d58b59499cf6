"""Content digests as hash trees, so that threads and ranks can share the hashing of what they read anyway.

A tensor's bytes are cut into leaves of 256 KiB, each with its BLAKE3 digest (about three times as fast as SHA-256); the
tensor's digest is the SHA-256 of its name, dtype, shape and leaves (Merkle 1987, two levels). Whoever reads a part of a
tensor knows that part's leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from blake3 import blake3
from tqdm import tqdm

from recyclable.weights.checkpoint_files import Ranged, SafetensorsFile, Source, Stored

LEAF = 1 << 18
"""Bytes of a leaf."""
PIECE = 16 * LEAF
"""Bytes that one task of a thread reads at a time."""
_MAX_THREADS = 8

Leaves = dict[str, dict[int, bytes]]
"""Tensor name -> number of the leaf -> its BLAKE3 digest."""
T = TypeVar("T")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed (hex)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (hex)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Digest (hex) of any bit of a file: the hash tree of a safetensors file, the SHA-256 of any other."""
    return Digested(SafetensorsFile(path)).file_digest() if path.suffix == ".safetensors" else sha256_file(path)


class Digested(Ranged):
    """A source of tensors; whatever is read through this is hashed on the way.

    A read of elements [start, stop) hashes the leaves that begin in that range, and reads on to the end of the last
    of them: ranges that cover a tensor without overlap hash each of its leaves exactly once.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.leaves: Leaves = {name: {} for name in source.names}

    @property
    def names(self) -> list[str]:
        """The source's."""
        return self.source.names

    def stored(self, name: str) -> Stored:
        """The source's."""
        return self.source.stored(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor; the leaves that begin there are hashed."""
        nbytes = self.source.stored(name).nbytes
        first = -(-start // LEAF)
        end = min(nbytes, -(-stop // LEAF) * LEAF) if first * LEAF < stop else stop
        data = self.source.read_bytes(name, start, end)
        for leaf in range(first, -(-end // LEAF) if first * LEAF < stop else first):
            begin = leaf * LEAF - start
            self.leaves[name][leaf] = blake3(data[begin : begin + LEAF]).digest()
        return data[: stop - start]

    def complete(self, threads: int | None = None) -> None:
        """Read and hash what has not been read yet."""
        missing = [
            (name, piece)
            for name in self.names
            for piece in _pieces(self.stored(name).nbytes)
            if any(leaf not in self.leaves[name] for leaf in range(piece[0] // LEAF, -(-piece[1] // LEAF)))
        ]
        in_threads(lambda task: self._hash(task[0], *task[1]), missing, threads=threads)

    def tensor_digests(self, threads: int | None = None) -> dict[str, str]:
        """Name -> digest (hex) of every tensor; completes what is missing."""
        self.complete(threads)
        return {name: self._tensor_digest(name) for name in self.names}

    def _hash(self, name: str, start: int, stop: int) -> None:
        self.read_bytes(name, start, stop)

    def _tensor_digest(self, name: str) -> str:
        stored, leaves = self.stored(name), self.leaves[name]
        digest = hashlib.sha256(f"{name}|{stored.dtype}|{stored.shape}|".encode())
        digest.update(b"".join(leaves[i] for i in range(len(leaves))))
        return digest.hexdigest()

    def file_digest(self) -> str:
        """Digest (hex) of a whole safetensors file: its header and its tensors, which leave no byte between them."""
        header = hashlib.sha256(self.source.header).hexdigest()
        return sha256_json([header, *self.tensor_digests().values()])


def _pieces(nbytes: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, nbytes)) for start in range(0, nbytes, size))


def element_pieces(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int, int]]:
    """(name, start, stop) in elements of every tensor, in pieces whose bytes end with a leaf in every dtype."""
    size = PIECE // 4
    return [(name, *piece) for name, shape in shapes.items() for piece in _pieces(torch.Size(shape).numel(), size)]


def in_threads(
    work: Callable[[Any], T], tasks: Iterable[Any], label: str | None = None, threads: int | None = None
) -> list[T]:
    """`work` on every task, a few at a time; reading, hashing, adding and writing all let go of the GIL.

    The first failure is raised, and no task is started after it.

    Args:
        label: shown beside a progress bar on a terminal; None shows none.
        threads: None takes as many as there are cores, 8 at most.
    """
    with _one_torch_thread(), ThreadPoolExecutor(threads or min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            return [future.result() for future in tqdm(futures, label, disable=None if label else True, leave=False)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The pool's threads take torch's setting over when they start: without this each would bring a team of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
