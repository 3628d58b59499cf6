"""Unlabelled text for pre-training: documents found and read out of core, once as long as no file changes."""

from __future__ import annotations

import glob
import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from recyclable.data.bad_rows import BadRow, BadRows
from recyclable.data.files import check_text, format_of, read_rows
from recyclable.data.hub import load_hub, pick_split
from recyclable.data.packing import Packed, pack
from recyclable.data.text_cache import Documents, kept
from recyclable.errors import InputError

__all__ = ["Packed", "find_corpus", "load_corpus", "pack"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def find_corpus(
    source: str | Path | list[str] | list[Path],
    *,
    text_column: str = "text",
    split: str = "train",
    quiet: bool = True,
    cache_dir: str | Path | None = None,
    bad: BadRows | None = None,
) -> Documents:
    """Documents that are read once: as long as no file changes, the next start knows their digest and reads nothing.

    Blank documents are left out.

    Args:
        source: a path, a glob, a directory with files named `{split}.*`, a list of these, or the name of a data set on
            the Hugging Face hub ("name" or "name:config"). Formats: .txt (a document per line), .jsonl, .json, .csv,
            .tsv, each also with .gz, and .parquet.
        text_column: where the text is (.txt files have no columns: this is not used for them).
        split: which files of a directory, which split of a hub data set.
        quiet: no progress bar.
        cache_dir: where the Arrow copy lives; the cache of `datasets` by default. A file whose size or time of change
            differs is read anew, and so is one whose copy is damaged when it is opened.
        bad: what becomes of rows that cannot be used, and which there were; by default the first one is an error.

    Raises:
        InputError: nothing found under that name, unsupported extension, broken file, missing column, no text.
    """
    names = [str(item) for item in source] if isinstance(source, list) else [str(source)]
    if not names:
        raise InputError("corpus", "an empty list, expected at least one path")
    bad, root = bad or BadRows(), Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    found = [_find_files(name, split) for name in names]
    if len(names) == 1 and found[0] is None:
        with progress_bars(not quiet):
            part = pick_split(load_hub(names[0], cache_dir), names[0], split)
        where, key = names[0], _key(part._fingerprint, text_column, bad.policy)
        documents = partial(_of_hub, names[0], part, text_column)
    else:
        for name, files in zip(names, found, strict=True):
            if files is None:
                raise InputError(name, "no such file or directory")
        every = tuple(path for files in found for path in files or ())
        where, key = ", ".join(map(str, every)), _key([_state(file) for file in every], text_column, bad.policy)
        documents = partial(_of_files, every, text_column)
    return kept(root / "recyclable_text" / key, lambda judge: _some(documents(judge), where, judge), bad, quiet)


def load_corpus(source: str | Path | list[str] | list[Path], **how: Any) -> datasets.Dataset:
    """What `find_corpus` finds, opened: a memory-mapped data set with the one string column "text"."""
    return find_corpus(source, **how).dataset()


def files_of_corpus(source: str | list[str], split: str = "train") -> list[Path]:
    """The files that `load_corpus` reads; none of a data set on the hub."""
    names = source if isinstance(source, list) else [source]
    return [path for name in names for path in _find_files(name, split) or ()]


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Show or hide the bars of `datasets` inside the block, and put its setting back."""
    hidden = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if show else datasets.disable_progress_bars)()
        yield
    finally:
        (datasets.disable_progress_bars if hidden else datasets.enable_progress_bars)()


def _find_files(name: str, split: str) -> list[Path] | None:
    """The files one source string stands for; None when it is no path here, but might be a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.glob(f"{glob.escape(split)}.*") if file.is_file())
        if not files:
            content = sorted(item.name for item in path.iterdir())[:10]
            raise InputError(path, f"no file named {split}.*, found {content or 'an empty directory'}")
    elif path.is_file():
        files = [path]
    elif glob.has_magic(name):
        files = sorted(found for item in glob.glob(str(path), recursive=True) if (found := Path(item)).is_file())
        if not files:
            raise InputError(name, "no file matches this pattern")
    elif format_of(path) or not _HUB_NAME.fullmatch(name) or ("/" in name and path.parent.is_dir()):
        raise InputError(name, "no such file or directory")
    else:
        return None
    return [file.resolve() for file in files]


def _of_files(files: tuple[Path, ...], text_column: str, bad: BadRows) -> Iterator[str]:
    """The documents of files, in order."""
    for file in files:
        column = "text" if (format_of(file) or "").startswith(".txt") else text_column
        for number, row in read_rows(file, [column], bad):
            with bad:
                if column not in row:
                    problem = f"no column {column!r}, found {sorted(row)}"
                    raise BadRow(f"{file}, row {number}", problem, f"no column {column!r}")
                if row[column] is not None and _has_text(text := check_text(file, number, column, row[column])):
                    yield text


def _of_hub(name: str, dataset: datasets.Dataset, column: str, bad: BadRows) -> Iterator[str]:
    """The documents of a data set of the hub, in order."""
    if column not in dataset.column_names:
        raise InputError(name, f"no column {column!r}, found {sorted(dataset.column_names)}")
    if dataset.features[column] not in (datasets.Value("string"), datasets.Value("large_string")):
        raise InputError(name, f"column {column!r} holds {dataset.features[column]}, expected strings")
    for number, row in enumerate(dataset.select_columns([column]), 1):
        with bad:
            if row[column] is not None and _has_text(text := check_text(name, number, column, row[column])):
                yield text


def _some(documents: Iterable[str], where: str, bad: BadRows) -> Iterator[str]:
    """The documents; InputError where there is none."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        problem = "no text found, expected at least one document that is not blank"
        raise InputError(where, f"{problem}; {bad}" if bad.counts else problem)


def _key(*told: object) -> str:
    return hashlib.sha256(repr(("documents 3", *told)).encode()).hexdigest()[:32]


_TICK_S, _COARSE_TICK_S = 0.02, 2.0
"""How long the clock of a file system stands still at most; the latter where it knows seconds alone."""


def _state(file: Path) -> tuple[object, ...]:
    """What changes when the file does: every change of it sets its ctime.

    Two changes within a tick of the clock set the same one. So none is read within a tick of its last change.
    """
    stat = file.stat()
    tick = _TICK_S if stat.st_ctime_ns % 1_000_000_000 else _COARSE_TICK_S
    if 0 <= (since := time.time() - stat.st_ctime) < tick:
        time.sleep(tick - since)
    return str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _has_text(text: str) -> bool:
    return bool(text and not text.isspace())
