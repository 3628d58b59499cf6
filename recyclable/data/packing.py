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

from recyclable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = "packed 1"  # part of every key: raise it when the same input would pack differently
_BATCH = 1000  # documents tokenised per call


class Packed:
    """Token sequences of one length, memory-mapped: `packed[i]` is an int64 array [seq_len].

    Attributes:
        seq_len: tokens in a sequence, the added begin and end tokens included.
        tokens: tokens of the documents in all sequences, without begin, end and separator tokens.
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
        if self._path.stat().st_size != self._shape[0] * self.seq_len * np.dtype(self._dtype).itemsize:
            raise ValueError(f"{self._path}: wrong size")
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        if self._ids is None:
            self._ids = np.memmap(self._path, self._dtype, mode="r", shape=self._shape)
        return np.array(self._ids[int(i)], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:  # worker processes open the file again instead of receiving a copy
        return {**self.__dict__, "_ids": None}


def pack(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    quiet: bool = True,
    cache_dir: str | Path | None = None,
) -> Packed:
    """Tokenise all documents, join them with the tokenizer's separator and cut the stream into full sequences.

    A sequence is [begin] + a piece of the stream + [end], with the tokenizer's cls or bos and its sep or eos token,
    whichever it has. The incomplete last piece is dropped. The result depends on the text, the tokenizer and seq_len
    alone; the second call with the same three reads the cache and does not tokenise. Several processes may call it at
    once: the first finished result is kept, complete or not at all.

    Args:
        dataset: has a string column "text", as `load_corpus` returns it.
        quiet: no progress bar.
        cache_dir: where packed corpora are kept; inside the cache of `datasets` by default.

    Raises:
        InputError: fewer tokens than one sequence, or a seq_len with no room for text.
    """
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "recyclable_packed"
    folder = root / _cache_key(dataset, tokenizer, seq_len)
    if (packed := _open(folder)) is not None:
        return packed
    aside = root / f".aside-{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    try:
        _write(aside, dataset, tokenizer, seq_len, quiet)
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


def _open(folder: Path) -> Packed | None:
    try:
        return Packed(folder)
    except (OSError, ValueError, KeyError):
        return None


def _write(
    folder: Path, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, quiet: bool
) -> None:
    begin = _first(tokenizer.cls_token_id, tokenizer.bos_token_id)
    end = _first(tokenizer.sep_token_id, tokenizer.eos_token_id)
    body = seq_len - len(begin) - len(end)
    if body < 1:
        raise InputError("seq_len", f"{seq_len} leaves no room for text, expected at least {seq_len - body + 1}")
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    digest = hashlib.sha256(f"{seq_len}\n".encode())
    sequences = tokens = seen = 0
    rest = np.empty(0, dtype)
    with (folder / "ids.bin").open("wb") as file:
        for piece in _token_batches(dataset, tokenizer, end, dtype, quiet):
            seen += len(piece)
            stream = np.concatenate([rest, piece])
            full = len(stream) // body
            rows = np.empty((full, seq_len), dtype)
            rows[:, : len(begin)] = begin
            rows[:, len(begin) : len(begin) + body] = stream[: full * body].reshape(full, body)
            rows[:, len(begin) + body :] = end
            rest = stream[full * body :]
            sequences += full
            tokens += full * body - (int(np.isin(stream[: full * body], end).sum()) if end else 0)
            file.write(rows.tobytes())
            digest.update(rows.astype("<u4").tobytes())
        _sync(file)
    if sequences == 0:
        raise InputError(
            "corpus", f"it has {seen} tokens, fewer than one sequence of {seq_len}: add text, or cut seq_len"
        )
    meta = {"seq_len": seq_len, "sequences": sequences, "tokens": tokens, "digest": digest.hexdigest(), "dtype": dtype}
    with (folder / "meta.json").open("wb") as file:
        file.write(json.dumps(meta, indent=1).encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _first(*ids: int | None) -> list[int]:
    return next(([i] for i in ids if i is not None), [])


def _token_batches(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, separator: list[int], dtype: str, quiet: bool
) -> Iterator[np.ndarray]:
    """Token ids [n] of a batch of documents at a time, the separator between documents."""
    first = True
    with tqdm(total=len(dataset), desc="tokenising", unit=" documents", disable=quiet) as bar:
        for batch in dataset.iter(_BATCH):
            ids: list[int] = []
            # verbose=False: no warning about documents longer than the model's limit; they are cut here
            for document in tokenizer(
                batch["text"],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]:
                ids += document if first else separator + document
                first = False
            bar.update(len(batch["text"]))
            yield np.array(ids, dtype)


def _cache_key(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> str:
    key = hashlib.sha256(f"{_VERSION} {seq_len} {tokenization_digest(tokenizer)}\n".encode())
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
