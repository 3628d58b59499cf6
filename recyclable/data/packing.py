"""Tokenise a corpus once into a table of full sequences, kept in a cache keyed by its content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from recyclable.data.layout import Layout, wrapped
from recyclable.data.packed import IDS, STARTS, Joined, Packed, write_meta
from recyclable.data.text_cache import Documents
from recyclable.data.tokenising import tokenised
from recyclable.errors import InputError
from recyclable.output import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Joined", "Packed", "pack", "tokenization_digest"]

_VERSION = "packed 4"  # part of every key: raise it when the same input would pack differently
_BATCH = 1000  # documents looked up at a time
_TOKENS = 1 << 18  # written at a time


def pack(
    corpus: datasets.Dataset | Documents,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    layout: Layout | None = None,
    *,
    quiet: bool = True,
    cache_dir: str | Path | None = None,
    where: object = "corpus",
    verified: bool = False,
) -> Packed:
    """Tokenise all documents, join them and cut the stream into full sequences, as a layout says.

    The incomplete last piece is dropped. The result depends on the text, the tokenizer, seq_len and layout alone; the
    second call with the same reads the cache and does not tokenise, nor read what `find_corpus` found. Several
    processes may call it at once: the first finished result is kept, complete or not at all.

    Args:
        corpus: has a string column "text", as `load_corpus` returns it.
        layout: None is `wrapped`.
        quiet: no progress bar.
        cache_dir: where packed corpora are kept; inside the cache of `datasets` by default.
        where: what errors call the corpus.
        verified: another process that has this cache did the same a moment ago: bytes are not compared once more.

    Raises:
        InputError: fewer tokens than one sequence, none of the text itself, or a seq_len with no room for text.
    """
    layout = layout or wrapped(tokenizer)
    root = Path(cache_dir or cache_root()) / "recyclable_packed"
    documents = corpus if isinstance(corpus, Documents) else Documents.of(corpus)
    folder = root / _cache_key(documents, tokenizer, seq_len, layout)
    if (packed := _open(folder, verified)) is not None:
        return packed
    aside = root / f".aside-{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    try:
        _write(aside, documents.dataset(), tokenizer, seq_len, layout, quiet, where)
        try:
            os.rename(aside, folder)
        except OSError:  # another process was faster, or what lies there is damaged
            with suppress(InputError):
                return Packed(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        return Packed(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cache_root() -> Path:
    """Where documents and what is packed of them are kept: the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE)


def _open(folder: Path, verified: bool) -> Packed | None:
    """What is there; None where nothing is, or where it is damaged, which is told."""
    if not folder.is_dir():
        return None
    try:
        return Packed(folder, verified=verified)
    except InputError as error:
        say(f"notice: a packed corpus is damaged and is made anew: {error}")
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
    with (folder / IDS).open("wb") as file, (folder / STARTS).open("wb") as starts_file:
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
    write_meta(folder, seq_len, sequences, tokens, digest.hexdigest(), dtype)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _token_batches(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, layout: Layout, dtype: str, quiet: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids [n] of some documents at a time, or of a part of one, and where documents start [n]."""
    ids: list[int] = []
    starts: list[int] = []
    separator: list[int] = []
    with tqdm(total=len(dataset), desc="tokenising", unit=" documents", disable=quiet) as bar:
        for piece in tokenised(tokenizer, map(pa.StringScalar.as_py, _texts(dataset))):
            if piece.begins:
                ids += separator  # belongs to the document before it
                starts.append(len(ids))
                ids += layout.before
            ids += piece.ids
            if piece.ends:
                ids += layout.after
                separator = [*layout.between]
                bar.update()
            if len(ids) > _TOKENS:
                yield _marked(ids, starts, dtype)
                starts = [0] if starts[-1:] == [len(ids)] else []  # a document that has begun, but with no token yet
                ids = []
        yield _marked(ids, starts, dtype)


def _marked(ids: list[int], starts: list[int], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    marks = np.zeros(len(ids), np.bool_)
    marks[[start for start in starts if start < len(ids)]] = True
    return np.array(ids, dtype), marks


def _texts(dataset: datasets.Dataset) -> Iterator[pa.StringScalar]:
    """Its documents one by one, where they lie."""
    for table in dataset.with_format("arrow").iter(_BATCH):
        yield from table["text"]


def _cache_key(documents: Documents, tokenizer: PreTrainedTokenizerBase, seq_len: int, layout: Layout) -> str:
    told = f"{_VERSION} {seq_len} {layout} {tokenization_digest(tokenizer)} {documents.digest}"
    return hashlib.sha256(told.encode()).hexdigest()


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
