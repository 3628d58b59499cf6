"""A task file: where it is, which keys it may have, what they may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from recyclable.config.plain_yaml import read_yaml
from recyclable.config.run_file import make_config
from recyclable.config.settings import Settings
from recyclable.data.bad_rows import Policy
from recyclable.data.files import format_of
from recyclable.errors import InputError, shown
from recyclable.tasks import every_kind
from recyclable.tasks.parts.columns import Columns, listed
from recyclable.tasks.parts.kind import TaskKind

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
_OF_ALL_KINDS = ("name", "train", "dev", "test", "problem", "labels", "dataset", "bad_rows")


def known_keys(kinds: Sequence[TaskKind]) -> list[str]:
    """The keys that a task file of one of these kinds may have; those of the usual columns are known to all."""
    of_kinds = (key for kind in kinds for key in (*kind.column_keys(), *kind.settings.model_fields))
    return list(dict.fromkeys((*_OF_ALL_KINDS, *Columns().keys, *of_kinds)))


def describe(source: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any], Path]:
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
    spec = read_yaml(path, "a task file", f"the keys {', '.join(known_keys(every_kind()))}")
    if path.stem != "task" and "dataset" not in spec:
        spec.setdefault("name", path.stem)
    return str(path), spec, path.parent.resolve()


def check(where: str, spec: dict[str, Any], kinds: Sequence[TaskKind]) -> None:
    """InputError for a key that none of these kinds has, and for what is no name, path or list of labels."""
    known, settings = known_keys(kinds), {key for kind in kinds for key in kind.settings.model_fields}
    for key, value in spec.items():
        if key not in known:
            raise InputError(where, f"unknown key {key!r}, expected one of {', '.join(known)}")
        if key in settings or (value is None and key in SPLIT_NAMES):
            continue
        if key != "labels" and not (isinstance(value, str | Path) and str(value)):
            raise InputError(where, f"{key} is {shown(value)}, expected a string")
    if (policy := spec.get("bad_rows", "refuse")) not in get_args(Policy):
        raise InputError(where, f"bad_rows is {policy!r}, expected one of {', '.join(get_args(Policy))}")
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


def require_read(where: str, spec: dict[str, Any], kinds: Sequence[TaskKind], layout: Columns) -> None:
    """InputError for the name of a column that one of these kinds has, but not this layout."""
    columns = {*Columns().keys, *(key for kind in kinds for key in kind.column_keys())} - {*layout.keys}
    if unread := [key for key in spec if key in columns]:
        problem = f"{unread[0]} is given, but this kind of task reads only the columns of {listed(layout.keys)}"
        raise InputError(where, problem)


def settings_of(where: str, spec: dict[str, Any], kind: TaskKind) -> Settings:
    """What the task file says to the kind beside its columns; InputError for what only others read."""
    told = {key: value for key, value in spec.items() if key not in (*_OF_ALL_KINDS, *kind.column_keys())}
    for key in told:
        if key not in kind.settings.model_fields:
            raise InputError(where, f"{key} is given, but nothing reads it where problem is {kind.name}")
    return make_config(kind.settings, told, where)


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
