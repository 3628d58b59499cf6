"""A tokenised corpus on disk: sequences of one length, read one at a time, and a record that knows any changed bit."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from recyclable.errors import InputError, RunError
from recyclable.weights.durable import write_json
from recyclable.weights.hashes import blake3_file, sha256_json
from recyclable.weights.strict_json import read_json

IDS, STARTS = "ids.bin", "starts.bin"
_META = "meta.json"


def write_meta(folder: Path, seq_len: int, sequences: int, tokens: int, digest: str, dtype: str) -> None:
    """Complete a folder that holds `IDS` and `STARTS`; see `Packed`."""
    files = {name: blake3_file(folder / name) for name in (IDS, STARTS)}
    told = {"seq_len": seq_len, "sequences": sequences, "tokens": tokens, "digest": digest, "dtype": dtype}
    meta = {**told, "files": files}
    write_json(folder / _META, {**meta, "record": sha256_json(meta)})


class Packed:
    """Token sequences of one length, on disk: `packed[i]` is an int64 array [seq_len].

    All bytes are compared with their digests when it is opened, unless another process has just done so. A file that is
    cut short later is an error in one line, as nothing is mapped into memory, where it would be the end of the process.

    Args:
        verified: another process found all bytes right a moment ago: here the record and files' sizes are looked at.

    Attributes:
        seq_len: tokens in a sequence, the added begin and end tokens included.
        tokens: tokens of the documents in all sequences, without those that the layout adds.
        digest: sha256 (hex) of seq_len and all token ids as little-endian uint32: equal exactly if the sequences are.

    Raises InputError when a file is missing, or is not what was written.
    """

    def __init__(self, folder: Path, *, verified: bool = False) -> None:
        meta = read_json(folder / _META, finite=True)
        if meta.pop("record", None) != sha256_json(meta):
            raise InputError(folder / _META, "was changed after it was written")
        self.seq_len: int = meta["seq_len"]
        self.tokens: int = meta["tokens"]
        self.digest: str = meta["digest"]
        self._folder, self._sequences = folder, int(meta["sequences"])
        self._dtypes = {IDS: np.dtype(meta["dtype"]), STARTS: np.dtype(np.bool_)}
        self._open: dict[str, int] = {}
        for name, written in meta["files"].items():
            expected = self._sequences * self.seq_len * self._dtypes[name].itemsize
            try:
                size = (folder / name).stat().st_size
                found = written if verified else blake3_file(folder / name)
            except OSError as error:
                raise InputError(folder / name, f"cannot be read ({error.strerror})") from error
            if size != expected:
                raise InputError(folder / name, f"has {size:,} bytes, expected {expected:,}")
            if found != written:
                raise InputError(folder / name, "was changed after it was written (BLAKE3 differs)")

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, i: int) -> np.ndarray:
        return self._row(IDS, i).astype(np.int64)

    def documents(self, i: int) -> np.ndarray:
        """Which document of the sequence each token belongs to: int64 [seq_len], from 0.

        What follows a document belongs to it; what a sequence begins with, and ends with, to its first and last.
        """
        numbers = np.cumsum(self._row(STARTS, i), dtype=np.int64)
        return numbers - numbers[0]

    def _row(self, name: str, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        dtype = self._dtypes[name]
        size = self.seq_len * dtype.itemsize
        try:
            if name not in self._open:
                self._open[name] = os.open(self._folder / name, os.O_RDONLY)
                weakref.finalize(self, os.close, self._open[name])
            data = os.pread(self._open[name], size, int(i) * size)
        except OSError as error:
            raise RunError(self._folder / name, f"cannot be read any more ({error.strerror})") from error
        if len(data) < size:
            raise RunError(self._folder / name, f"ends before sequence {i}: it was cut short after it was opened")
        return np.frombuffer(data, dtype)

    def __getstate__(self) -> dict[str, Any]:  # worker processes open the files again
        return {**self.__dict__, "_open": {}}


class Joined:
    """Two packed corpora as one, the second's sequences behind the first's."""

    def __init__(self, first: Packed, second: Packed) -> None:
        self._parts, self._second = (first, second), len(first)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, i: int) -> np.ndarray:
        part, place = self._of(i)
        return part[place]

    def documents(self, i: int) -> np.ndarray:
        """As `Packed.documents`."""
        part, place = self._of(i)
        return part.documents(place)

    def _of(self, i: int) -> tuple[Packed, int]:
        return (self._parts[1], i - self._second) if i >= self._second else (self._parts[0], i)
