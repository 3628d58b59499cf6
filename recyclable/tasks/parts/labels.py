"""Labels as files spell them: class names in order, indices, numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

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
        found: labels of the training rows; InputError names `where` when all are one.
    """
    if given is not None:
        return tuple(class_name(label) for label in given)
    names = {class_name(label) for label in found}
    if len(names) < 2:
        raise InputError(where, f"every label is {names.pop()!r}, expected at least two classes")
    integers = all(re.fullmatch(r"0|-?[1-9][0-9]*", name) for name in names)
    return tuple(sorted(names, key=int)) if integers else tuple(sorted(names))


def class_index(label: object, index: dict[str, int], raw: Raw, place: int, named: bool) -> int:
    """The index of a row's class; InputError when there is none of its name.

    Args:
        named: the classes were given, not found in train.
    """
    if (name := class_name(label)) not in index:
        labels, known = list(index), "the list of labels" if named else "train"
        shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise InputError(f"{raw.where}, row {place}", f"label {name!r} is not in {known}, which has {shown}")
    return index[name]
