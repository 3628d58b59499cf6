"""Content digests as hash trees, so that threads and ranks can share the hashing of what they read anyway.

A tensor's bytes are cut into leaves of 256 KiB, each with its BLAKE3 digest (about three times as fast as SHA-256); the
tensor's digest is the SHA-256 of its name, dtype, shape and leaves (Merkle 1987, two levels). Whoever reads a part of a
tensor knows that part's leaves.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from blake3 import blake3
from tqdm import tqdm

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import SafetensorsFile, Source, Stored
from recyclable.weights.finite import is_finite
from recyclable.weights.hashes import sha256_file, sha256_json
from recyclable.weights.team import ALONE, Team

LEAF = 1 << 18
"""Bytes of a leaf."""
PIECE = 16 * LEAF
"""Bytes that one task of a thread reads at a time."""
_ELEMENTS = PIECE // 4
_MAX_THREADS = 8

_DIGEST = 32  # bytes of a leaf's digest
T = TypeVar("T")
S = TypeVar("S", bound=Source, covariant=True)


def file_digest(path: Path) -> str:
    """Digest (hex) of any bit of a file: the hash tree of a safetensors file, the SHA-256 of any other."""
    return Digested(SafetensorsFile(path)).file_digest() if path.suffix == ".safetensors" else sha256_file(path)


class Leaves:
    """The digests of a tensor's leaves as they become known: 33 bytes a leaf, so 18 MB for 140 GB."""

    def __init__(self, nbytes: int) -> None:
        count = -(-nbytes // LEAF)
        self._digests, self._known = bytearray(count * _DIGEST), bytearray(count)

    def __setitem__(self, leaf: int, digest: bytes) -> None:
        self._digests[leaf * _DIGEST : (leaf + 1) * _DIGEST] = digest
        self._known[leaf] = 1

    def all_known(self, first: int, last: int) -> bool:
        """Whether those of leaves [first, last) are."""
        return self._known.find(0, first, last) < 0

    def runs(self) -> list[tuple[int, bytes]]:
        """(first leaf, digests one behind the other) of every run of known ones."""
        found, begin = [], self._known.find(1)
        while begin >= 0:
            end = self._known.find(0, begin)
            end = len(self._known) if end < 0 else end
            found.append((begin, bytes(self._digests[begin * _DIGEST : end * _DIGEST])))
            begin = self._known.find(1, end)
        return found

    def add(self, runs: Iterable[tuple[int, bytes]]) -> None:
        """Take over those that somebody else knows."""
        for first, digests in runs:
            self._digests[first * _DIGEST : first * _DIGEST + len(digests)] = digests
            self._known[first : first + len(digests) // _DIGEST] = b"\1" * (len(digests) // _DIGEST)

    def joined(self) -> bytes:
        """All digests, in order."""
        return bytes(self._digests)


class Digested(Source, Generic[S]):
    """A source of tensors; whatever is read through this is hashed, and looked through for NaN, on the way.

    A read of elements [start, stop) hashes the leaves that begin in that range, and reads on to the end of the last
    of them: ranges that cover a tensor without overlap hash each of its leaves exactly once.
    """

    def __init__(self, source: S) -> None:
        self.source = source
        self.leaves = {name: Leaves(source.stored(name).nbytes) for name in source.names}
        self._broken: set[str] = set()  # tensors with numbers that are not finite

    @property
    def names(self) -> list[str]:
        """The source's."""
        return self.source.names

    def stored(self, name: str) -> Stored:
        """The source's."""
        return self.source.stored(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor; the leaves that begin there are hashed."""
        stored = self.source.stored(name)
        nbytes = stored.nbytes
        first = -(-start // LEAF)
        end = min(nbytes, -(-stop // LEAF) * LEAF) if first * LEAF < stop else stop
        data = self.source.read_bytes(name, start, end)
        for leaf in range(first, -(-end // LEAF) if first * LEAF < stop else first):
            begin = leaf * LEAF - start
            piece = data[begin : begin + LEAF]
            self.leaves[name][leaf] = blake3(piece.data).digest()
            if not is_finite(torch.from_numpy(piece).view(stored.dtype)):
                self._broken.add(name)
        return data[: stop - start]

    def complete(self, threads: int | None = None, team: Team = ALONE) -> None:
        """Bring together what the team has hashed, and read and hash what nobody has, shared out; a collective.

        Raises InputError, on every member, for a tensor with NaN or infinity in it.
        """
        self._merge(team)
        missing = [
            (name, piece)
            for name in self.names
            for piece in _pieces(self.stored(name).nbytes)
            if not self.leaves[name].all_known(piece[0] // LEAF, -(-piece[1] // LEAF))
        ]
        in_threads(lambda task: self._hash(task[0], *task[1]), missing[team.rank :: team.size], threads=threads)
        if missing:
            self._merge(team)
        for name in sorted(self._broken):
            where, named = self.source.origin(name)
            raise InputError(where, f"{named} holds NaN or infinity, expected finite numbers: the weights are damaged")

    def origin(self, name: str) -> tuple[object, str]:
        """The source's."""
        return self.source.origin(name)

    def _merge(self, team: Team) -> None:
        if team.size == 1:
            return
        own = {name: leaves.runs() for name, leaves in self.leaves.items()}
        for known, broken in team.gather((own, self._broken)):
            self._broken = self._broken | broken
            for name, runs in known.items():
                self.leaves[name].add(runs)

    def tensor_digests(self, threads: int | None = None) -> dict[str, str]:
        """Name -> digest (hex) of every tensor; completes what is missing."""
        self.complete(threads)
        return {name: self._tensor_digest(name) for name in self.names}

    def _hash(self, name: str, start: int, stop: int) -> None:
        self.read_bytes(name, start, stop)

    def _tensor_digest(self, name: str) -> str:
        stored = self.stored(name)
        digest = hashlib.sha256(f"{name}|{stored.dtype}|{stored.shape}|".encode())
        digest.update(self.leaves[name].joined())
        return digest.hexdigest()

    def file_digest(self: Digested[SafetensorsFile]) -> str:
        """Digest (hex) of a whole safetensors file: its header and its tensors, which leave no byte between them."""
        header = hashlib.sha256(self.source.header).hexdigest()
        return sha256_json([header, *self.tensor_digests().values()])


def _pieces(nbytes: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, nbytes)) for start in range(0, nbytes, size))


def element_pieces(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int, int]]:
    """(name, start, stop) in elements of every tensor, in pieces whose bytes end with a leaf in every dtype."""
    return [(name, *piece) for name, shape in shapes.items() for piece in element_ranges(0, torch.Size(shape).numel())]


def element_ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in such pieces; they end at the same places of a tensor whatever the start."""
    while start < stop:
        end = min(stop, (start // _ELEMENTS + 1) * _ELEMENTS)
        yield start, end
        start = end


def in_threads(
    work: Callable[[Any], T],
    tasks: Iterable[Any],
    label: str | None = None,
    threads: int | None = None,
    team: Team = ALONE,
) -> list[T]:
    """`work` on every task, a few at a time; reading, hashing, adding and writing all let go of the GIL.

    The first failure is raised, and no task is started after it.

    Args:
        label: shown beside a progress bar on a terminal; None shows none.
        threads: None takes as many as there are cores, 8 at most.
        team: the tasks are shared out to its members, and every one gets all results; a collective.
    """
    tasks = list(tasks)
    own = tasks[team.rank :: team.size]
    results: list[Any] = [None] * len(own)
    threads = min(threads or min(_MAX_THREADS, os.cpu_count() or 1), max(1, len(own)))
    failures: list[tuple[int, BaseException]] = []
    lock = threading.Lock()
    with (
        _one_torch_thread(),
        tqdm(total=len(own), desc=label, disable=None if label else True, leave=False) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        todo = iter(range(len(own)))

        def go_on() -> None:  # one task after the other: a future for each would be 100 MB for a model of 140 GB
            while True:
                with lock:
                    number = None if failures else next(todo, None)
                if number is None:
                    return
                try:
                    results[number] = work(own[number])
                except BaseException as error:
                    failures.append((number, error))
                with lock:
                    bar.update()

        try:
            for worker in [pool.submit(go_on) for _ in range(threads)]:
                worker.result()
        except BaseException as error:  # as when a person ends it
            failures.append((-1, error))
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    parts = team.gather(results)
    return [parts[i % team.size][i // team.size] for i in range(len(tasks))]


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The pool's threads take torch's setting over when they start: without this each would bring a team of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
