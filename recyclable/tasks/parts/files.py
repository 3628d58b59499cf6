"""Find and read the files of a labelled task: a directory, a task file in YAML, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recyclable.config.plain_yaml import explained, load_yaml
from recyclable.config.run_file import make_config
from recyclable.config.settings import Settings
from recyclable.data.files import Row, format_of, label_names, read_features, read_rows, with_names
from recyclable.errors import InputError
from recyclable.tasks import KINDS, every_kind
from recyclable.tasks.parts.columns import Columns, choose, listed
from recyclable.tasks.parts.kind import TaskKind

_OF_ALL_KINDS = ("name", "train", "dev", "test", "problem", "labels", "dataset")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass
class Raw:
    """One split as its file has it: what the columns hold, checked, and the row each came from."""

    where: str
    untyped: bool  # CSV and TSV: numbers are strings there
    texts: list[Any] = field(default_factory=list)
    pairs: list[Any] | None = None
    labels: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    features: Mapping[str, Any] = field(default_factory=dict)
    """What a file of `datasets` declares of its columns."""
    declared: tuple[str, ...] | None = None
    """The names of the labels, in order, where the file declares them."""


Rows = list[Any]
"""[what is known of a split, (place, row) after (place, row) of it]"""


class Source(NamedTuple):
    """A task as its files have it."""

    name: str
    labels: list[Any] | None
    """As the task file lists them."""
    raws: dict[str, Raw]
    """"train" and the other splits there are."""
    kind: TaskKind
    settings: Settings
    """What the task file says to the kind beside the columns (`TaskKind.settings`)."""


def known_keys() -> list[str]:
    """All keys that a task file may have."""
    of_kinds = (key for kind in every_kind() for key in (*kind.column_keys(), *kind.settings.model_fields))
    return list(dict.fromkeys((*_OF_ALL_KINDS, *of_kinds)))


def read_source(source: str | Path | dict[str, Any]) -> Source:
    """Read a task's files; raises what `load_task` says."""
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
    kinds = [KINDS.get(spec["problem"], where)()] if "problem" in spec else every_kind()
    layout = choose((layout for kind in kinds for layout in kind.layouts), spec, _first(rows["train"]))
    kinds = [kind for kind in kinds if layout in kind.layouts]
    if "labels" in spec:
        if not any(kind.has_labels for kind in kinds):
            raise InputError(where, f"labels are for classes, but problem is {kinds[0].name}")
        kinds = [kind for kind in kinds if kind.has_labels]
    _require_read(where, spec, layout)
    raws = {split: _collect(raw, of, layout.named(spec), spec) for split, (raw, of) in rows.items()}
    kind = max(kinds, key=lambda kind: kind.claims(raws["train"]))
    having_pairs = {split for split, raw in raws.items() if raw.pairs is not None}
    if having_pairs and having_pairs != set(raws):
        lacking = next(raw for split, raw in raws.items() if split not in having_pairs)
        raise InputError(lacking.where, "no second text, but other splits have one")
    return Source(str(spec.get("name", name)), spec.get("labels"), raws, kind, _settings(where, spec, kind))


def _first(train: Rows) -> dict[str, Any]:
    """The first row, which is left where it is; empty where there is none."""
    _, rows = train
    first = next(rows, None)
    if first is None:
        return {}
    train[1] = chain([first], rows)
    return first[1]


def _require_read(where: str, spec: dict[str, Any], layout: Columns) -> None:
    """InputError for the name of a column that is not read."""
    of_columns = {key for kind in every_kind() for key in kind.column_keys()}
    if unread := [key for key in spec if key in of_columns and key not in layout.keys]:
        problem = f"{unread[0]} is given, but this kind of task reads only the columns of {listed(layout.keys)}"
        raise InputError(where, problem)


def _settings(where: str, spec: dict[str, Any], kind: TaskKind) -> Settings:
    """What the task file says to the kind; InputError for what only another kind reads."""
    told = {key: value for key, value in spec.items() if key not in (*_OF_ALL_KINDS, *kind.column_keys())}
    for key in told:
        if key not in kind.settings.model_fields:
            raise InputError(where, f"{key} is given, but nothing reads it where problem is {kind.name}")
    return make_config(kind.settings, told, where)


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
        raise InputError(path, f"found {type(spec).__name__}, expected the keys {', '.join(known_keys())}")
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
    known, settings = known_keys(), {key for kind in every_kind() for key in kind.settings.model_fields}
    for key, value in spec.items():
        if key not in known:
            raise InputError(where, f"unknown key {key!r}, expected one of {', '.join(known)}")
        if key in settings or (value is None and key in SPLIT_NAMES):
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


def _collect(raw: Raw, rows: Iterable[Row], columns: Columns, spec: Mapping[str, Any]) -> Raw:
    """Fill `raw`.

    Args:
        columns: by the names they have here.
        spec: second texts whose column it names are there, else where the first row has them.
    """
    text, pair, label = columns.text, columns.pair, columns.label
    raw.declared = None if label is None else label_names(raw.features.get(label.name))
    for place, row in rows:
        where = f"{raw.where}, row {place}"
        if pair is not None and not raw.texts and (pair.needed or pair.name in row or pair.key in spec):
            raw.pairs = []
        elif pair is not None and raw.pairs is None and pair.name in row:
            raise InputError(where, f"column {pair.name!r} is new here, expected it in every row or in none")
        found = {}
        for column in columns.every:
            if column is pair and raw.pairs is None:
                continue
            if column.name not in row:
                hint = f"name it in task.yaml, as `{column.key}: COLUMN`"
                raise InputError(where, f"no column {column.name!r}, found {sorted(row)}; {hint}")
            found[column.key] = column.holds.read(raw.where, place, column.name, row[column.name])
        raw.texts.append(found[text.key])
        raw.labels.append(None if label is None else found[label.key])
        raw.places.append(place)
        if pair is not None and raw.pairs is not None:
            raw.pairs.append(found[pair.key])
    if not raw.texts:
        raise InputError(raw.where, "this split is empty, expected at least one example")
    return raw
