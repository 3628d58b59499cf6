"""Documents kept in Arrow's format, memory-mapped, with what was left out of them; checked whenever they are opened."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm.auto import tqdm

from recyclable.data.bad_rows import BadRows
from recyclable.output import say
from recyclable.weights.durable import sync, write_json
from recyclable.weights.hashes import sha256_file

_TEXT, _META = "text.arrow", "meta.json"
_SCHEMA = pa.schema([("text", pa.string())])
_DOCUMENTS, _CHARACTERS = 1000, 1 << 22  # that are written at a time, at most; one longer document is by itself


def kept(folder: Path, documents: Iterable[str], bad: BadRows, quiet: bool) -> datasets.Dataset:
    """The documents as a data set with the column "text", read once; from then on from `folder`, whole or not at all.

    Several processes may call it at once: the first finished result is kept.

    Args:
        documents: judged by `bad`; read where `folder` does not have them whole.
        quiet: no progress bar.
    """
    if (found := _open(folder, bad)) is not None:
        return found
    if folder.is_dir():
        say(f"notice: what was kept of a corpus is damaged and is read anew: {folder}")
    aside = folder.with_name(f".aside-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        _write(aside / _TEXT, tqdm(documents, desc="reading", unit=" documents", disable=quiet))
        write_json(aside / _META, {"digest": sha256_file(aside / _TEXT), "bad_rows": bad.as_dict()})
        try:
            os.rename(aside, folder)
        except OSError:  # another process was faster, or what lies there is damaged
            if _open(folder, BadRows(bad.policy)) is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return datasets.Dataset.from_file(str(folder / _TEXT))


def _open(folder: Path, bad: BadRows) -> datasets.Dataset | None:
    """What is kept; None where nothing is, or it is damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
        if sha256_file(folder / _TEXT) != meta["digest"]:
            return None
        bad.add(meta["bad_rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return datasets.Dataset.from_file(str(folder / _TEXT))


def _write(path: Path, documents: Iterable[str]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for batch in _batches(documents):
            writer.write(pa.record_batch([pa.array(batch, pa.string())], schema=_SCHEMA))
    sync(path)


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
