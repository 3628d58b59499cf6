"""Labels as files spell them: class names in order, indices, numbers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from recyclable.errors import InputError
from recyclable.tasks.parts.files import Raw


def number(label: object) -> float | None:
    """The finite number that a label is or spells, else None."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        value = float(label)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def class_name(label: object) -> str:
    """What a class is called: `str(label)`, 1.0 as "1"."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def class_names(given: Sequence[object] | None, found: Iterable[object], where: str) -> tuple[str, ...]:
    """The classes in order: as given, else sorted: as numbers if all spell integers, else as strings.

    Args:
        given: by the task file or, where that is silent, by the files (`declared_names`).
        found: labels of the training rows; InputError names `where` when all are one.
    """
    names = dict.fromkeys(class_name(label) for label in (found if given is None else given))
    if len(names) < 2:
        problem = f"every label is {_shown(names)!r}" if names else "there is no label"
        raise InputError(where, f"{problem}, expected at least two classes")
    if given is not None:
        return tuple(names)
    integers = all(re.fullmatch(r"0|-?[1-9][0-9]*", name) for name in names)
    return tuple(sorted(names, key=int)) if integers else tuple(sorted(names))


def declared_names(raws: Mapping[str, Raw]) -> tuple[str, ...] | None:
    """The classes in the order that the files of a task declare (ClassLabel); None where none of them does.

    Raises InputError where two splits declare others, or another order.
    """
    telling = [raw for raw in raws.values() if raw.declared is not None]
    for raw in telling[1:]:
        if (found := raw.declared) != (first := telling[0].declared):
            problem = f"declares the labels {_shown(found)}, but {telling[0].where} {_shown(first)}"
            raise InputError(raw.where, f"{problem}: expected the same, in the same order, or `labels` in task.yaml")
    return telling[0].declared if telling else None


def _shown(labels: Iterable[str] | None) -> str:
    """At most twenty of them."""
    names = list(labels or ())
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def look_alike(labels: Sequence[str]) -> list[list[str]]:
    """Classes that differ only in case, in blanks, or in how Unicode writes the same characters, together."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(unicodedata.normalize("NFKC", label).casefold().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def class_index(label: object, index: dict[str, int], raw: Raw, place: int, named: bool) -> int:
    """The index of a row's class; InputError when there is none of its name.

    Args:
        named: the classes were given, not found in train.
    """
    if (name := class_name(label)) not in index:
        known = "the list of labels" if named else "train"
        raise InputError(f"{raw.where}, row {place}", f"label {name!r} is not in {known}, which has {_shown(index)}")
    return index[name]
