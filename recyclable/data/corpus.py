"""Unlabelled text for pre-training: load documents out of core, pack them once into fixed-length token sequences."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from recyclable.data.files import check_text, format_of, read_rows
from recyclable.data.hub import load_hub, pick_split
from recyclable.data.packing import Packed, pack
from recyclable.errors import InputError

__all__ = ["Packed", "load_corpus", "pack"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FEATURES = datasets.Features({"text": datasets.Value("string")})


def load_corpus(
    source: str | Path | list[str] | list[Path],
    *,
    text_column: str = "text",
    split: str = "train",
    quiet: bool = True,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Load documents, memory-mapped, as a data set with the one string column "text"; blank documents are left out.

    Args:
        source: a path, a glob, a directory with files named `{split}.*`, a list of these, or the name of a data set on
            the Hugging Face hub ("name" or "name:config"). Formats: .txt (a document per line), .jsonl, .json, .csv,
            .tsv, each also with .gz, and .parquet.
        text_column: where the text is (.txt files have no columns: this is not used for them).
        split: which files of a directory, which split of a hub data set.
        quiet: no progress bar.
        cache_dir: where the Arrow copy lives; the cache of `datasets` by default. A file whose size or time of change
            differs is read anew.

    Raises:
        InputError: nothing found under that name, unsupported extension, broken file, missing column, no text.
    """
    names = [str(item) for item in source] if isinstance(source, list) else [str(source)]
    if not names:
        raise InputError("corpus", "an empty list, expected at least one path")
    with progress_bars(not quiet):
        found = [_find_files(name, split) for name in names]
        if len(names) == 1 and found[0] is None:
            return _load_hub(names[0], text_column, split, cache_dir)
        for name, files in zip(names, found, strict=True):
            if files is None:
                raise InputError(name, "no such file or directory")
        return _load_files(tuple(path for files in found for path in files or ()), text_column, cache_dir)


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


def _load_files(files: tuple[Path, ...], text_column: str, cache_dir: str | Path | None) -> datasets.Dataset:
    key = hashlib.sha256(f"documents 1 {text_column!r}".encode())
    for file in files:
        stat = file.stat()
        key.update(repr((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
    try:
        return datasets.Dataset.from_generator(
            _documents,
            features=_FEATURES,
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs={"files": files, "text_column": text_column},
            fingerprint=key.hexdigest()[:32],
        )
    except datasets.exceptions.DatasetGenerationError as error:  # wraps what the generator raises
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def _documents(files: tuple[Path, ...], text_column: str) -> Iterator[dict[str, str]]:
    empty = True
    for file in files:
        column = "text" if (format_of(file) or "").startswith(".txt") else text_column
        for number, row in read_rows(file, [column]):
            if column not in row:
                raise InputError(f"{file}, row {number}", f"no column {column!r}, found {sorted(row)}")
            if row[column] is not None and _has_text(text := check_text(file, number, column, row[column])):
                empty = False
                yield {"text": text}
    if empty:  # said here, since `datasets` would keep an empty cache that it cannot open
        raise _no_text(", ".join(map(str, files)))


def _load_hub(name: str, text_column: str, split: str, cache_dir: str | Path | None) -> datasets.Dataset:
    dataset = pick_split(load_hub(name, cache_dir), name, split)
    if text_column not in dataset.column_names:
        raise InputError(name, f"no column {text_column!r}, found {sorted(dataset.column_names)}")
    if dataset.features[text_column] not in (datasets.Value("string"), datasets.Value("large_string")):
        raise InputError(name, f"column {text_column!r} holds {dataset.features[text_column]}, expected strings")
    dataset = dataset.select_columns([text_column])
    dataset = dataset if text_column == "text" else dataset.rename_column(text_column, "text")
    dataset = dataset.filter(_has_text, input_columns="text")
    if len(dataset) == 0:
        raise _no_text(name)
    return dataset


def _no_text(where: str) -> InputError:
    return InputError(where, "no text found, expected at least one document that is not blank")


def _has_text(text: str | None) -> bool:
    return bool(text and not text.isspace())
