"""Labelled tasks: train, dev and test examples with class indices or numbers, from a directory or a task file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recyclable.data.task_files import Raw, read_source
from recyclable.errors import InputError

Problem = Literal["classification", "regression"]


@dataclass(frozen=True)
class Split:
    """Examples: texts, their second texts if the task has pairs, and class indices (or numbers, in regression)."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Split:
        """The examples at these positions, in this order."""
        chosen = [int(i) for i in indices]
        return Split(
            texts=[self.texts[i] for i in chosen],
            pairs=None if self.pairs is None else [self.pairs[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
        )


@dataclass(frozen=True)
class Task:
    """A task: `labels[i]` names class i (empty for regression); `splits` has "train" and, if given, "dev" and "test".

    `digest` is the sha256 (hex) of problem, labels and all examples; name and place do not enter.
    """

    name: str
    problem: Problem
    labels: tuple[str, ...]
    splits: dict[str, Split]
    digest: str


def load_task(source: str | Path | dict[str, Any]) -> Task:
    """Load a task.

    Args:
        source: a directory with train, dev (also validation, valid, val) and test files in .jsonl, .json, .csv, .tsv
            (each also .gz) or .parquet, columns "text", "text_pair" (optional) and "label"; or a YAML file, by the name
            task.yaml inside a directory too, with any of the keys

            name; train, dev, test: paths relative to the file; text, text_pair, label: column names;
            problem: classification or regression; labels: class names in the order wanted;
            dataset: "name" or "name:config" on the Hugging Face hub; train, dev and test then name its splits
            (null: do without, say where the labels of a test split are secret);

            or the same keys as a dict, paths relative to the working directory.

    The problem is regression if a label of train is a number with a fractional part, else classification. Classes are
    named `str(label)` (1.0 is "1") and sorted: as numbers if all spell integers, else as strings; `labels` gives
    another order.

    Raises:
        InputError: nothing there, no train split, unknown key, missing column, empty split, null text or label, a label
            that train lacks, a label that is no number in regression.
    """
    name, spec, raws = read_source(source)
    problem = _problem(spec.get("problem"), spec.get("labels"), raws["train"])
    if problem == "regression":
        labels: tuple[str, ...] = ()
        splits = {key: Split(raw.texts, raw.pairs, _numbers(raw)) for key, raw in raws.items()}
    else:
        labels = _classes(spec.get("labels"), raws["train"])
        splits = {
            key: Split(raw.texts, raw.pairs, _indices(raw, labels, named="labels" in spec)) for key, raw in raws.items()
        }
    return Task(name, problem, labels, splits, _digest(problem, labels, splits))


def _problem(given: Problem | None, labels: object, train: Raw) -> Problem:
    if given is not None:
        return given
    if labels is not None:
        return "classification"
    values = [_number(label) if train.untyped or isinstance(label, float) else None for label in train.labels]
    if train.untyped and None in values:  # a CSV cell may look like a number among names
        return "classification"
    return "regression" if any(x is not None and not x.is_integer() for x in values) else "classification"


def _number(label: object) -> float | None:
    """The finite number that a label is or spells, else None."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        value = float(label)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _numbers(raw: Raw) -> list[float]:
    numbers = []
    for place, label in zip(raw.places, raw.labels, strict=True):
        number = _number(label)
        if number is None:
            raise InputError(f"{raw.where}, row {place}", f"label {label!r}, expected a finite number (regression)")
        numbers.append(number)
    return numbers


def _class(label: object) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _classes(given: Sequence[object] | None, train: Raw) -> tuple[str, ...]:
    if given is not None:
        return tuple(_class(label) for label in given)
    names = {_class(label) for label in train.labels}
    if len(names) < 2:
        raise InputError(train.where, f"every label is {names.pop()!r}, expected at least two classes")
    integers = all(re.fullmatch(r"0|-?[1-9][0-9]*", name) for name in names)
    return tuple(sorted(names, key=int)) if integers else tuple(sorted(names))


def _indices(raw: Raw, labels: tuple[str, ...], named: bool) -> list[int]:
    index = {name: i for i, name in enumerate(labels)}
    indices = []
    for place, label in zip(raw.places, raw.labels, strict=True):
        if (name := _class(label)) not in index:
            known = "the list of labels" if named else "train"
            shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
            raise InputError(f"{raw.where}, row {place}", f"label {name!r} is not in {known}, which has {shown}")
        indices.append(index[name])
    return indices


def _digest(problem: str, labels: tuple[str, ...], splits: dict[str, Split]) -> str:
    digest = hashlib.sha256(json.dumps([problem, labels]).encode())
    for key, split in splits.items():
        digest.update(json.dumps([key, len(split)]).encode())
        for i in range(len(split)):
            row = [split.texts[i], split.pairs[i] if split.pairs else None, split.labels[i]]
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
