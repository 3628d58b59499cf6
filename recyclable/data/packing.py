"""Tokenise a corpus once into a memory-mapped table of full sequences, kept in a cache keyed by its content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import datasets
import numpy as np
from tqdm.auto import tqdm

from recyclable.data.layout import Layout, wrapped
from recyclable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = "packed 3"  # part of every key: raise it when the same input would pack differently
_BATCH = 1000  # documents tokenised per call


class Packed:
    """Token sequences of one length, memory-mapped: `packed[i]` is an int64 array [seq_len].

    Attributes:
        seq_len: tokens in a sequence, the added begin and end tokens included.
        tokens: tokens of the documents in all sequences, without those that the layout adds.
        digest: sha256 (hex) of seq_len and all token ids as little-endian uint32: equal exactly if the sequences are.
    """

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.seq_len: int = meta["seq_len"]
        self.tokens: int = meta["tokens"]
        self.digest: str = meta["digest"]
        self._path = folder / "ids.bin"
        self._dtype: str = meta["dtype"]
        self._shape = (int(meta["sequences"]), self.seq_len)
        self._starts_path = folder / "starts.bin"
        for path, dtype in ((self._path, self._dtype), (self._starts_path, np.bool_)):
            if path.stat().st_size != self._shape[0] * self.seq_len * np.dtype(dtype).itemsize:
                raise ValueError(f"{path}: wrong size")
        self._ids: np.ndarray | None = None
        self._starts: np.ndarray | None = None

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        if self._ids is None:
            self._ids = np.memmap(self._path, self._dtype, mode="r", shape=self._shape)
        return np.array(self._ids[int(i)], dtype=np.int64)

    def documents(self, i: int) -> np.ndarray:
        """Which document of the sequence each token belongs to: int64 [seq_len], from 0.

        What follows a document belongs to it; what a sequence begins with, and ends with, to its first and last.
        """
        if self._starts is None:
            self._starts = np.memmap(self._starts_path, np.bool_, mode="r", shape=self._shape)
        numbers = np.cumsum(self._starts[int(i)], dtype=np.int64)
        return numbers - numbers[0]

    def __getstate__(self) -> dict[str, Any]:  # worker processes open the files again instead of receiving a copy
        return {**self.__dict__, "_ids": None, "_starts": None}


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


def pack(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    layout: Layout | None = None,
    *,
    quiet: bool = True,
    cache_dir: str | Path | None = None,
    where: object = "corpus",
) -> Packed:
    """Tokenise all documents, join them and cut the stream into full sequences, as a layout says.

    The incomplete last piece is dropped. The result depends on the text, the tokenizer, seq_len and layout alone; the
    second call with the same reads the cache and does not tokenise. Several processes may call it at once: the first
    finished result is kept, complete or not at all.

    Args:
        dataset: has a string column "text", as `load_corpus` returns it.
        layout: None is `wrapped`.
        quiet: no progress bar.
        cache_dir: where packed corpora are kept; inside the cache of `datasets` by default.
        where: what errors call the corpus.

    Raises:
        InputError: fewer tokens than one sequence, none of the text itself, or a seq_len with no room for text.
    """
    layout = layout or wrapped(tokenizer)
    root = Path(cache_dir or cache_root()) / "recyclable_packed"
    folder = root / _cache_key(dataset, tokenizer, seq_len, layout)
    if (packed := _open(folder)) is not None:
        return packed
    aside = root / f".aside-{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    try:
        _write(aside, dataset, tokenizer, seq_len, layout, quiet, where)
        try:
            os.rename(aside, folder)
        except OSError:  # another process was faster, or what lies there is damaged
            if (packed := _open(folder)) is not None:
                return packed
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        return Packed(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cache_root() -> Path:
    """Where documents and what is packed of them are kept: the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE)


def _open(folder: Path) -> Packed | None:
    try:
        return Packed(folder)
    except (OSError, ValueError, KeyError):
        return None


def _write(
    folder: Path,
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    layout: Layout,
    quiet: bool,
    where: object,
) -> None:
    first, last = len(layout.begin), seq_len - len(layout.end)
    body = last - first
    if body < 1:
        raise InputError("max_length", f"{seq_len} leaves no room for text, expected at least {seq_len - body + 1}")
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    digest = hashlib.sha256(f"{seq_len}\n".encode())
    sequences = tokens = seen = 0
    rest, rest_starts = np.empty(0, dtype), np.empty(0, np.bool_)
    added = [*layout.before, *layout.after, *layout.between]
    with (folder / "ids.bin").open("wb") as file, (folder / "starts.bin").open("wb") as starts_file:
        for piece, piece_starts in _token_batches(dataset, tokenizer, layout, dtype, quiet):
            seen += len(piece)
            stream, starts = np.concatenate([rest, piece]), np.concatenate([rest_starts, piece_starts])
            full = len(stream) // body
            used = full * body
            rows, row_starts = np.empty((full, seq_len), dtype), np.zeros((full, seq_len), np.bool_)
            rows[:, :first], rows[:, last:] = layout.begin, layout.end
            rows[:, first:last] = stream[:used].reshape(full, body)
            row_starts[:, first:last] = starts[:used].reshape(full, body)
            within = ~row_starts[:, first : first + max(1, len(layout.cut))].any(axis=1)
            rows[within, first : first + len(layout.cut)] = layout.cut
            row_starts[:, : first + 1] = np.arange(first + 1) == 0  # a sequence begins with its first document
            rest, rest_starts = stream[used:], starts[used:]
            sequences += full
            tokens += used - int(np.isin(rows[:, first:last], added).sum())
            file.write(rows.tobytes())
            starts_file.write(row_starts.tobytes())
            digest.update(rows.astype("<u4").tobytes())
        _sync(file)
        _sync(starts_file)
    if sequences == 0:
        raise InputError(
            where, f"it has {seen} tokens, fewer than one sequence of {seq_len}: add text, or cut max_length"
        )
    if tokens == 0:
        raise InputError(where, "the tokenizer makes no token of its text, which teaches nothing")
    meta = {"seq_len": seq_len, "sequences": sequences, "tokens": tokens, "digest": digest.hexdigest(), "dtype": dtype}
    with (folder / "meta.json").open("wb") as file:
        file.write(json.dumps(meta, indent=1).encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _token_batches(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, layout: Layout, dtype: str, quiet: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids [n] of a batch of documents at a time, and where documents start [n]."""
    before, after = [*layout.before], [*layout.after]
    separator: list[int] = []
    with tqdm(total=len(dataset), desc="tokenising", unit=" documents", disable=quiet) as bar:
        for batch in dataset.iter(_BATCH):
            ids: list[int] = []
            starts: list[int] = []
            # verbose=False: no warning about documents longer than the model's limit; they are cut here
            for document in tokenizer(
                batch["text"],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]:
                ids += separator  # belongs to the document before it
                starts.append(len(ids))
                ids += before + document + after
                separator = [*layout.between]
            bar.update(len(batch["text"]))
            marks = np.zeros(len(ids), np.bool_)
            marks[[start for start in starts if start < len(ids)]] = True
            yield np.array(ids, dtype), marks


def _cache_key(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, layout: Layout) -> str:
    key = hashlib.sha256(f"{_VERSION} {seq_len} {layout} {tokenization_digest(tokenizer)}\n".encode())
    for batch in dataset.iter(_BATCH):  # hundreds of times faster than tokenising, and sure where a path is not
        for text in batch["text"]:
            encoded = text.encode()
            key.update(len(encoded).to_bytes(8, "little") + encoded)
    return key.hexdigest()


def tokenization_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides which ids a text gets; the size of the vocabulary alone would not do."""
    content: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "begin, end": [tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id],
    }
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # truncation and padding are what the last call happened to leave behind
        state = json.loads(backend.to_str())
        content["backend"] = {name: part for name, part in state.items() if name not in ("truncation", "padding")}
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            content["files"] = {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in sorted(Path(folder).iterdir())
                if file.is_file()
            }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
