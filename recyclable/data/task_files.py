"""Find and read the files of a labelled task: a directory, a task file in YAML, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recyclable.data.files import Row, check_text, class_name, format_of, read_rows
from recyclable.errors import InputError

KEYS = ("name", "train", "dev", "test", "text", "text_pair", "label", "problem", "labels", "dataset")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass
class Raw:
    """One split as its file has it: checked texts, labels of whatever type, and the row each came from."""

    where: str
    untyped: bool  # CSV and TSV: numbers are strings there
    texts: list[str] = field(default_factory=list)
    pairs: list[str] | None = None
    labels: list[object] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def read_source(source: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Raw]]:
    """Return (name of the task, its checked keys, {"train": rows, ...}); raises what `tasks.load_task` says."""
    where, spec, root = _describe(source)
    _check(where, spec)
    if "dataset" in spec:
        name, raws = spec["dataset"], _read_hub(spec)
    else:
        name = root.name if root != Path() else "task"
        raws = {}
        for split in SPLIT_NAMES:
            if (path := spec.get(split)) is not None:
                raws[split] = _read_file(root / Path(path).expanduser(), spec)
    if "train" not in raws:
        raise InputError(where, "no train split, expected a file named train.* or the key `train`")
    having_pairs = {split for split, raw in raws.items() if raw.pairs is not None}
    if having_pairs and having_pairs != set(raws):
        lacking = next(raw for split, raw in raws.items() if split not in having_pairs)
        raise InputError(lacking.where, "no second text, but other splits have one")
    return str(spec.get("name", name)), spec, raws


def _describe(source: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any], Path]:
    """Where the task comes from, for messages; its keys; the folder that paths are relative to."""
    if isinstance(source, dict):
        return "task", dict(source), Path()
    path = Path(source).expanduser()
    if path.is_dir() and (path / "task.yaml").is_file():
        path = path / "task.yaml"
    if path.is_dir():
        return str(path), _find_splits(path), path.resolve()
    if not path.is_file():
        raise InputError(path, "no such file or directory, expected a directory with train.* or a task file (.yaml)")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(path, "expected a directory with train.* or a task file that ends in .yaml")
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(path, f"broken YAML ({error})") from error
    if not isinstance(spec, dict):
        raise InputError(path, f"found {type(spec).__name__}, expected the keys {', '.join(KEYS)}")
    if path.stem != "task" and "dataset" not in spec:
        spec.setdefault("name", path.stem)
    return str(path), spec, path.parent.resolve()


def _find_splits(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        suffix = format_of(file) if file.is_file() else None
        if suffix is None or suffix.startswith(".txt"):
            continue
        for split, names in SPLIT_NAMES.items():
            if file.name[: -len(suffix)] in names:
                if split in found:
                    raise InputError(folder, f"both {found[split]} and {file.name} could be the {split} split")
                found[split] = file.name
    return found


def _check(where: str, spec: dict[str, Any]) -> None:
    for key, value in spec.items():
        if key not in KEYS:
            raise InputError(where, f"unknown key {key!r}, expected one of {', '.join(KEYS)}")
        if value is None and key in SPLIT_NAMES:
            continue
        if key != "labels" and not (isinstance(value, str | Path) and str(value)):
            raise InputError(where, f"{key} is {value!r}, expected a string")
    if spec.get("problem", "regression") not in ("classification", "regression"):
        raise InputError(where, f"problem is {spec['problem']!r}, expected classification or regression")
    if "labels" in spec:
        labels = spec["labels"]
        if not isinstance(labels, list | tuple) or any(not isinstance(x, str | int | float) for x in labels):
            raise InputError(where, f"labels is {labels!r}, expected a list of class names")
        if any(isinstance(x, bool) for x in labels):
            raise InputError(where, f"labels is {labels!r}: put quotes around names that YAML reads as true or false")
        if len(set(map(str, labels))) < max(2, len(labels)):
            raise InputError(where, f"labels is {labels!r}, expected at least two different names, each once")
        if spec.get("problem") == "regression":
            raise InputError(where, "labels are for classification, but problem is regression")


def _read_file(path: Path, spec: dict[str, Any]) -> Raw:
    suffix = format_of(path)
    if suffix is not None and suffix.startswith(".txt"):
        raise InputError(path, "a .txt file has no labels, expected .jsonl, .json, .csv, .tsv or .parquet")
    return _collect(Raw(str(path), untyped=suffix is not None and suffix[1:4] in ("csv", "tsv")), read_rows(path), spec)


def _read_hub(spec: dict[str, Any]) -> dict[str, Raw]:
    from datasets import ClassLabel  # slow to import, and files do not need it

    from recyclable.data.hub import load_hub, pick_split

    name, raws = spec["dataset"], {}
    data = load_hub(name)
    for split, usual in SPLIT_NAMES.items():
        chosen = spec[split] if split in spec else next((known for known in usual if known in data), None)
        if chosen is not None:
            part = pick_split(data, name, chosen)
            classes = {key: value.names for key, value in part.features.items() if isinstance(value, ClassLabel)}
            raws[split] = _collect(Raw(f"{name}, split {chosen}", untyped=False), _named(part, classes), spec)
    return raws


def _named(rows: Iterable[dict[str, Any]], classes: dict[str, list[str]]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield number, {**row, **{key: class_name(row[key], names) for key, names in classes.items()}}


def _collect(raw: Raw, rows: Iterable[Row], spec: dict[str, Any]) -> Raw:
    text, pair, label = spec.get("text", "text"), spec.get("text_pair", "text_pair"), spec.get("label", "label")
    for place, row in rows:
        where = f"{raw.where}, row {place}"
        if not raw.texts and (pair in row or "text_pair" in spec):
            raw.pairs = []
        elif raw.pairs is None and pair in row:
            raise InputError(where, f"column {pair!r} is new here, expected it in every row or in none")
        for column in (text, label) if raw.pairs is None else (text, pair, label):
            if column not in row:
                raise InputError(where, f"no column {column!r}, found {sorted(row)}")
            value = row[column]
            if value is None or value != value:  # null, or NaN where a data frame lost it
                raise InputError(where, f"column {column!r} is empty (null), expected a value")
            if column != label:
                check_text(raw.where, place, column, value)
            elif not isinstance(value, str | int | float):
                raise InputError(where, f"column {column!r} is {value!r}, expected a string or a number")
        raw.texts.append(row[text])
        raw.labels.append(row[label])
        raw.places.append(place)
        if raw.pairs is not None:
            raw.pairs.append(row[pair])
    if not raw.texts:
        raise InputError(raw.where, "this split is empty, expected at least one example")
    return raw
