"""Documents kept in Arrow's format, memory-mapped, with what was left out of them and a digest that packing goes by."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from blake3 import blake3
from tqdm.auto import tqdm

from recyclable.data.bad_rows import BadRows, Policy
from recyclable.errors import InputError
from recyclable.output import say
from recyclable.weights.durable import sync, write_json
from recyclable.weights.hashes import blake3_file, sha256_json
from recyclable.weights.strict_json import read_json

_TEXT, _META = "text.arrow", "meta.json"
_SCHEMA = pa.schema([("text", pa.string())])
_DOCUMENTS, _CHARACTERS = 1000, 1 << 22  # that are written at a time, at most; one longer document is by itself

Reads = Callable[[BadRows], Iterable[str]]
"""Reads documents anew, judged by what it is given."""


@dataclass(frozen=True)
class Documents:
    """A corpus whose content is known before any of it is read."""

    digest: str
    """Equal exactly if the documents are (`TextDigest`)."""
    dataset: Callable[[], datasets.Dataset]
    """Opens them, as a data set with the column "text"."""

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> Documents:
        """Any data set with such a column; all of it is read for its digest."""
        digest = TextDigest()
        for table in dataset.with_format("arrow").iter(_DOCUMENTS):
            for array in table["text"].chunks:
                digest.update(array)
        return cls(digest.hexdigest(), lambda: dataset)


class TextDigest:
    """BLAKE3 of documents and of their sizes, whatever the arrays that they come in."""

    def __init__(self) -> None:
        self._sizes, self._bytes = blake3(), blake3()

    def update(self, texts: pa.StringArray | pa.LargeStringArray) -> None:
        """Add some documents, none of them null."""
        _, offsets, data = texts.buffers()
        width = np.dtype("<i4" if pa.types.is_string(texts.type) else "<i8")
        if len(texts):
            ends = np.frombuffer(offsets, width, len(texts) + 1, texts.offset * width.itemsize)
            self._sizes.update(np.diff(ends).astype("<u8").tobytes())
            if ends[-1] > ends[0]:  # else there may be no buffer
                self._bytes.update(memoryview(data)[ends[0] : ends[-1]])

    def hexdigest(self) -> str:
        """Of all documents so far."""
        return blake3(self._sizes.digest() + self._bytes.digest()).hexdigest()


def kept(folder: Path, read: Reads, bad: BadRows, quiet: bool) -> Documents:
    """The documents, read once; from then on from `folder`, whole or not at all.

    What is kept is compared with its digest when it is opened, and read anew where it is damaged. Several processes may
    call it at once: the first finished result is kept.

    Args:
        bad: is told what is left out.
        quiet: no progress bar.
    """
    if (meta := _meta(folder)) is None:
        if folder.is_dir():
            _tell_damage(folder)
        meta = _make(folder, read, bad.policy, quiet)
    bad.add(meta["bad_rows"])
    known = meta["documents"]

    def dataset() -> datasets.Dataset:
        if not _is_whole(folder):
            _tell_damage(folder)
            if _make(folder, read, bad.policy, quiet)["documents"] != known:
                raise InputError(folder, "is of a corpus that was changed while it was read: start again")
        return datasets.Dataset.from_file(str(folder / _TEXT))

    return Documents(known, dataset)


def _tell_damage(folder: Path) -> None:
    say(f"notice: what was kept of a corpus is damaged and is read anew: {folder}")


def _meta(folder: Path) -> dict[str, Any] | None:
    """What is said of the documents that are kept; None where nothing is, or it is damaged."""
    try:
        meta = read_json(folder / _META, finite=True)
    except InputError:
        return None
    return meta if meta.pop("record", None) == sha256_json(meta) else None


def _is_whole(folder: Path) -> bool:
    try:
        meta = _meta(folder)
        return meta is not None and blake3_file(folder / _TEXT) == meta["digest"]
    except OSError:
        return False


def _make(folder: Path, read: Reads, policy: Policy, quiet: bool) -> dict[str, Any]:
    """Read the documents and keep them, unless another process was faster; returns what is said of them."""
    aside = folder.with_name(f".aside-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    bad = BadRows(policy)
    try:
        documents = _write(aside / _TEXT, tqdm(read(bad), desc="reading", unit=" documents", disable=quiet))
        meta = {"digest": blake3_file(aside / _TEXT), "documents": documents, "bad_rows": bad.as_dict()}
        write_json(aside / _META, {**meta, "record": sha256_json(meta)})
        try:
            os.rename(aside, folder)
        except OSError:  # another process was faster, or what lies there is damaged
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return meta


def _write(path: Path, documents: Iterable[str]) -> str:
    """Write the documents; returns their digest."""
    digest = TextDigest()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for batch in _batches(documents):
            texts = pa.array(batch, pa.string())
            digest.update(texts)
            writer.write(pa.record_batch([texts], schema=_SCHEMA))
    sync(path)
    return digest.hexdigest()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        if batch and (len(batch) == _DOCUMENTS or characters + len(document) > _CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document)
    if batch:
        yield batch
