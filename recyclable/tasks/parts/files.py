"""Find and read the files of a labelled task: a directory, a task file in YAML, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from recyclable.config.plain_yaml import explained, load_yaml
from recyclable.data.files import Row, check_text, format_of, label_names, read_features, read_rows, with_names
from recyclable.errors import InputError
from recyclable.tasks import KINDS, every_kind
from recyclable.tasks.parts.kind import Columns, TaskKind

KEYS = ("name", "train", "dev", "test", "text", "text_pair", "label", "problem", "labels", "dataset")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass
class Raw:
    """One split as its file has it: checked texts, labels of whatever type, and the row each came from."""

    where: str
    untyped: bool  # CSV and TSV: numbers are strings there
    texts: list[Any] = field(default_factory=list)
    pairs: list[str] | None = None
    labels: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    features: Mapping[str, Any] = field(default_factory=dict)
    """What a file of `datasets` declares of its columns."""
    declared: tuple[str, ...] | None = None
    """The names of the labels, in order, where the file declares them."""


Rows = list[Any]
"""[what is known of a split, (place, row) after (place, row) of it]"""


def read_source(source: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Raw], TaskKind]:
    """Name of the task, its checked keys, {"train": rows, ...} and its kind; raises what `load_task` says."""
    where, spec, root = _describe(source)
    _check(where, spec)
    if "dataset" in spec:
        name, rows = spec["dataset"], _hub_rows(spec)
    else:
        name = root.name if root != Path() else "task"
        paths = {split: spec[split] for split in SPLIT_NAMES if spec.get(split) is not None}
        rows = {split: _file_rows(root / Path(path).expanduser()) for split, path in paths.items()}
    if "train" not in rows:
        wanted = "the key `train` or a file train.jsonl, .json, .csv, .tsv, .conll or .parquet"
        raise InputError(where, f"no train split, expected {wanted}")
    given, columns = _columns(where, spec, rows["train"])
    if "text_pair" in spec and columns.text_pair is None:
        raise InputError(
            where, "text_pair is given, but this kind of task reads only the columns of `text` and `label`"
        )
    raws = {split: _collect(raw, of, columns, "text_pair" in spec) for split, (raw, of) in rows.items()}
    possible = [kind for kind in _kinds(columns.holds, columns.label_holds) if kind.has_labels or "labels" not in spec]
    kind = given or max(possible, key=lambda kind: kind.claims(raws["train"]))
    having_pairs = {split for split, raw in raws.items() if raw.pairs is not None}
    if having_pairs and having_pairs != set(raws):
        lacking = next(raw for split, raw in raws.items() if split not in having_pairs)
        raise InputError(lacking.where, "no second text, but other splits have one")
    return str(spec.get("name", name)), spec, raws, kind


def _kinds(holds: type, label_holds: type) -> list[TaskKind]:
    """The kinds whose texts and labels are of these types."""
    return [kind for kind in every_kind() if (kind.columns.holds, kind.columns.label_holds) == (holds, label_holds)]


def _columns(where: str, spec: dict[str, Any], train: Rows) -> tuple[TaskKind | None, Columns]:
    """The kind that the task file names, if any, and the columns that are read, by the names they have here.

    Rows of a task that names no problem are lists of words where a column for these is there, else texts; texts with
    labels may have their words beside them. A column for words with no column of texts beside it is to hold lists. All
    texts have one label, or all have a list of labels, as the first.
    """
    if "problem" in spec:
        kind = KINDS.get(spec["problem"], where)()
        if "labels" in spec and not kind.has_labels:
            raise InputError(where, f"labels are for classes, but problem is {kind.name}")
        return kind, _named(kind.columns, spec)
    _, rows = train
    first = next(rows, None)
    if first is not None:
        train[1] = chain([first], rows)
    row, texts = {} if first is None else first[1], _named(Columns(), spec)
    words = [_named(kind.columns, spec) for kind in _kinds(list, list)]
    without_texts = [columns for columns in words if columns.text in row and texts.text not in row]
    found = [columns for columns in words if isinstance(row.get(columns.text), list)] or without_texts
    tagged = isinstance(row.get(texts.label), list) and any(columns.label in row for columns in found)
    labelled = isinstance(row.get(texts.text), str) and texts.label in row and not tagged
    if found and not labelled:
        return None, found[0]
    return None, replace(texts, label_holds=list if isinstance(row.get(texts.label), list) else str)


def _named(columns: Columns, spec: dict[str, Any]) -> Columns:
    pair = columns.text_pair and spec.get("text_pair", columns.text_pair)
    text, label = spec.get("text", columns.text), spec.get("label", columns.label)
    return replace(columns, text=text, text_pair=pair, label=label)


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
        spec = load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise InputError(path, f"broken YAML: {explained(error)}") from error
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
    if "labels" in spec:
        labels = spec["labels"]
        if not isinstance(labels, list | tuple) or any(not isinstance(x, str | int | float) for x in labels):
            raise InputError(where, f"labels is {labels!r}, expected a list of class names")
        if any(isinstance(x, bool) for x in labels):
            raise InputError(where, f"labels is {labels!r}: put quotes around names that YAML reads as true or false")
        if len(set(map(str, labels))) < max(2, len(labels)):
            raise InputError(where, f"labels is {labels!r}, expected at least two different names, each once")
    written = map(str, (spec.get("name", ""), *spec.get("labels", ())))
    if any("\ud800" <= character <= "\udfff" for character in "".join(written)):
        raise InputError(where, "name or labels hold half a surrogate pair, expected valid Unicode")


def _file_rows(path: Path) -> Rows:
    suffix = format_of(path)
    if suffix is not None and suffix.startswith(".txt"):
        raise InputError(path, "a .txt file has no labels, expected .jsonl, .json, .csv, .tsv, .conll or .parquet")
    untyped = suffix is not None and suffix[1:4] in ("csv", "tsv")
    return [Raw(str(path), untyped, features=read_features(path)), read_rows(path)]


def _hub_rows(spec: dict[str, Any]) -> dict[str, Rows]:
    from recyclable.data.hub import load_hub, pick_split  # slow to import, and files do not need it

    name, found = spec["dataset"], {}
    data = load_hub(name)
    for split, usual in SPLIT_NAMES.items():
        chosen = spec[split] if split in spec else next((known for known in usual if known in data), None)
        if chosen is not None:
            part = pick_split(data, name, chosen)
            rows = ((number, with_names(row, part.features)) for number, row in enumerate(part, 1))
            found[split] = [Raw(f"{name}, split {chosen}", untyped=False, features=part.features), rows]
    return found


def _collect(raw: Raw, rows: Iterable[Row], columns: Columns, pairs: bool) -> Raw:
    """Fill `raw`.

    Args:
        pairs: the task file names the column of second texts.
    """
    text, pair, label = columns.text, columns.text_pair, columns.label
    raw.declared = label_names(raw.features.get(label))
    for place, row in rows:
        where = f"{raw.where}, row {place}"
        if pair is not None and not raw.texts and (pair in row or pairs):
            raw.pairs = []
        elif pair is not None and raw.pairs is None and pair in row:
            raise InputError(where, f"column {pair!r} is new here, expected it in every row or in none")
        for key, column in {"text": text, "text_pair": pair, "label": label}.items():
            if column is None or (key == "text_pair" and raw.pairs is None):
                continue
            if column not in row:
                hint = f"name it in task.yaml, as `{key}: COLUMN`"
                raise InputError(where, f"no column {column!r}, found {sorted(row)}; {hint}")
            value = row[column]
            is_text = column != label
            _check_cell(raw.where, place, column, value, is_text, columns.holds if is_text else columns.label_holds)
        raw.texts.append(row[text])
        raw.labels.append(row[label])
        raw.places.append(place)
        if pair is not None and raw.pairs is not None:
            raw.pairs.append(row[pair])
    if not raw.texts:
        raise InputError(raw.where, "this split is empty, expected at least one example")
    return raw


def _check_cell(where: str, place: int, column: str, value: object, is_text: bool, holds: type) -> None:
    """InputError for a cell that is no text (list of words), or no label (list of labels)."""
    row = f"{where}, row {place}"
    if holds is list and not isinstance(value, list) and not _is_missing(value):
        wanted = "words" if is_text else "labels"
        raise InputError(row, f"column {column!r} is {value!r}, expected a list of {wanted}")
    for one in value if holds is list and isinstance(value, list) else [value]:
        if _is_missing(one):
            raise InputError(row, f"column {column!r} is empty (null), expected a value")
        if is_text or isinstance(one, str):
            check_text(where, place, column, one)
        elif not isinstance(one, str | int | float):
            raise InputError(row, f"column {column!r} is {one!r}, expected a string or a number")


def _is_missing(value: object) -> bool:
    """Null, or NaN where a data frame lost it."""
    return value is None or value != value
