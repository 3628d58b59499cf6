"""Labelled tasks: train, dev and test examples with their targets, from a directory or a task file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recyclable import distributed
from recyclable.config.settings import Settings
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks import KINDS
from recyclable.tasks.parts.files import read_source
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.labels import declared_names, look_alike

_SHOWN = 5
"""Groups of classes that a notice names."""


@dataclass(frozen=True)
class Task:
    """A task: `labels[i]` names class i (empty for regression); `splits` has "train" and, if given, "dev" and "test".

    `digest` is the sha256 (hex) of problem, labels and all examples; name and place do not enter.
    """

    name: str
    problem: str
    """The name of its kind."""
    labels: tuple[str, ...]
    splits: dict[str, Split]
    digest: str
    ordered: bool = True
    """Whether somebody told the order of the labels: a task file, the files' ClassLabel, or names 0, 1, 2 ...; else it
    is the alphabet's, which says nothing of the rows of a head."""
    alike: bool = True
    """Whether that order is also the one in which the training texts first have the labels."""
    settings: Settings = field(default_factory=Settings)
    """What its task file says to its kind beside the columns (`TaskKind.settings`)."""
    left_out: dict[str, Any] = field(default_factory=dict, compare=False)
    """Bad rows of its files that are no examples (`data.bad_rows.BadRows.as_dict`)."""

    @property
    def kind(self) -> TaskKind:
        """What it is asked and scored by."""
        return KINDS.get(self.problem)()

    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        told = {"left_out": self.left_out} if self.left_out else {}
        return {"name": self.name, "problem": self.problem, "labels": list(self.labels), "digest": self.digest, **told}

    def in_order(self, labels: Sequence[str]) -> Task:
        """The same task where `labels[i]` names class i; InputError unless these are its own labels, each once."""
        if tuple(labels) == self.labels:
            return replace(self, ordered=True)
        if sorted(labels) != sorted(self.labels):
            raise InputError(self.name, f"has labels {list(self.labels)}, expected {list(labels)} in any order")
        places = [list(labels).index(label) for label in self.labels]
        splits = {name: replace(of, labels=self.kind.moved(of.labels, places)) for name, of in self.splits.items()}
        digest = _digest(self.problem, labels, splits)
        return replace(self, labels=tuple(labels), splits=splits, digest=digest, ordered=True)


def task_of(described: dict[str, Any]) -> Task:
    """A task without examples, from what a manifest says of it."""
    labels = tuple(described["labels"])
    return Task(described["name"], described["problem"], labels, {}, described.get("digest") or "")


def load_task(source: str | Path | dict[str, Any]) -> Task:
    """Load a task.

    Args:
        source: a directory with train, dev (also validation, valid, val) and test files in .jsonl, .json, .csv, .tsv,
            .conll (each also .gz) or .parquet, with the columns of its kind (`recyclable tasks`): "text", "text_pair"
            (optional) and "label", "tokens" and "tags", "prompt" and "response" ...; or a YAML file, by the name
            task.yaml inside a directory too, with any of the keys

            name; train, dev, test: paths relative to the file; text, text_pair, label, or others that the kind has:
            column names; problem: the kind; labels: class names in the order wanted (left out: as the files'
            ClassLabel columns have them, else sorted: as numbers where all spell integers);
            dataset: "name" or "name:config" on the Hugging Face hub; train, dev and test then name its splits
            (null: do without, say where the labels of a test split are secret);
            bad_rows: refuse (the first row that cannot be used is an error) or skip (they are left out and told);

            or the same keys as a dict, paths relative to the working directory.

    Rows that name no problem are of a kind whose columns the first row of train has (`tasks.parts.columns`); of
    several such kinds the surest takes them: regression if a label of train is a number with a fractional part, else
    classification.

    Raises:
        InputError: nothing there, no train split, unknown key, missing column, empty split, null text or label, a label
            that train lacks, a label that is no number in regression, splits that declare other labels or orders, a
            split whose texts are all blank.
    """
    name, listed, raws, kind, settings, bad = read_source(source)
    if bad.counts:
        distributed.say(f"notice: {name}: {bad}")
    given = listed or (declared_names(raws) if kind.has_labels else None)
    labels, splits = kind.read(given, raws)
    for split, raw in raws.items():
        if all(map(_is_blank, splits[split].texts)):
            raise InputError(raw.where, "every text is blank, expected some to read")
    if listed is None and (groups := look_alike(labels)):
        told = "; ".join(", ".join(map(ascii, group)) for group in groups[:_SHOWN]) + "; ..." * (len(groups) > _SHOWN)
        distributed.say(f"notice: {name}: classes that look alike are told apart: {told}")
    ordered = given is not None or labels == tuple(map(str, range(len(labels))))
    alike = list(dict.fromkeys(_flat(splits["train"].labels))) == list(range(len(labels)))
    return Task(
        name, kind.name, labels, splits, _digest(kind.name, labels, splits), ordered, alike, settings, bad.as_dict()
    )


def _is_blank(text: Any) -> bool:
    """Whether nothing is said in a text, a list of words or a conversation."""
    if isinstance(text, dict):
        return "content" in text and _is_blank(text["content"])
    return not text.strip() if isinstance(text, str) else all(map(_is_blank, text))


def _flat(targets: list[Any]) -> Iterator[Any]:
    for each in targets:
        yield from _flat(each) if isinstance(each, list) else (each,)


def _digest(problem: str, labels: Iterable[str], splits: dict[str, Split]) -> str:
    digest = hashlib.sha256(json.dumps([problem, tuple(labels)]).encode())
    for key, split in splits.items():
        digest.update(json.dumps([key, len(split)]).encode())
        for i in range(len(split)):
            row = [split.texts[i], split.pairs[i] if split.pairs else None, split.labels[i]]
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
