"""`lineage.json`: which base an upgraded base came from, and what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recyclable.errors import InputError
from recyclable.weights.durable import write_json
from recyclable.weights.strict_json import read_json

if TYPE_CHECKING:
    from recyclable.weights.base import Base

FILE = "lineage.json"
FORMAT = 1


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage recorded in a base's directory, None for a base without one (a root); InputError for a broken one."""
    file = folder / FILE
    if not file.is_file():
        return None
    lineage = read_json(file, finite=True)
    if (found := lineage.get("format", FORMAT)) != FORMAT:
        raise InputError(file, f"format {found!r}, this version reads {FORMAT}")
    if not is_fingerprint(lineage.get("fingerprint")) or not isinstance(lineage.get("ancestors"), list):
        raise InputError(file, "broken, expected JSON with fingerprint (weights, tokenizer, config) and ancestors")
    for place, ancestor in enumerate(lineage["ancestors"], 1):
        if not _is_ancestor(ancestor):
            raise InputError(file, f"broken, ancestor {place} is {ancestor!r}, expected its name and fingerprint")
    return lineage


def is_fingerprint(record: object) -> bool:
    """Whether a part of a JSON file is a `weights.fingerprint.Fingerprint`."""
    if not isinstance(record, dict):
        return False
    digests = dict(record)
    template = digests.pop("chat_template", None)  # none in a base without one; no such key in older records
    if digests.keys() != {"weights", "tokenizer", "config"} or not isinstance(template, str | None):
        return False
    return all(isinstance(digest, str) for digest in digests.values())


def _is_ancestor(record: object) -> bool:
    """A name, a fingerprint, and `declared` (true or false) if it is there."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("name"), str)
        and is_fingerprint(record.get("fingerprint"))
        and isinstance(record.get("declared", False), bool)
    )


def ancestors(folder: Path, own_weights: str) -> list[dict[str, Any]]:
    """The recorded ancestors of the base in `folder`, nearest first; none for a root.

    A lineage that was written for other weights than the base's own says nothing about it.
    """
    lineage = read_lineage(folder)
    return lineage["ancestors"] if lineage is not None and lineage["fingerprint"]["weights"] == own_weights else []


def described(folder: Path, name: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the base in `folder`: name, fingerprint, recorded ancestors."""
    return {"name": name, "fingerprint": fingerprint, "ancestors": ancestors(folder, fingerprint["weights"])}


def ancestors_for_child(parent: Path, name: str, parent_fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    """The ancestors a child of `parent` has: the parent first, then the parent's own."""
    own = {"name": name, "fingerprint": parent_fingerprint}
    return [own, *ancestors(parent, parent_fingerprint["weights"])]


def relation(folder: Path, own_weights: str, ancestor_weights: str) -> str | None:
    """How the base in `folder` is related to an ancestor, by a lineage that was written for its weights.

    Returns `own` (the same weights), `recorded` (by the runs that upgraded it), `declared` (a user's claim stands
    somewhere between), or None.
    """
    if own_weights == ancestor_weights:
        return "own"
    kind = "recorded"
    for ancestor in ancestors(folder, own_weights):
        if ancestor.get("declared"):
            kind = "declared"
        if ancestor["fingerprint"]["weights"] == ancestor_weights:
            return kind
    return None


def other_template(fingerprint: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two recorded bases have different chat templates; no where a record is older than these digests."""
    found = [each["chat_template"] for each in (fingerprint, other) if "chat_template" in each]
    return len(found) == 2 and found[0] != found[1]


def declare(child: Base, parent: Base, parent_name: str) -> dict[str, Any]:
    """Record the user's claim that `child` was made from `parent` by training elsewhere; returns the new lineage.

    Raises InputError when the child has a lineage of its own already, is the parent, or cannot be its descendant:
    other tensors, or other shapes (an embedding may have grown by rows).
    """
    from recyclable.weights.fingerprint import fingerprint  # with torch and transformers: reading needs neither

    own, of_parent = fingerprint(child), fingerprint(parent)
    if own.weights == of_parent.weights:
        raise InputError(child.folder, f"has the same weights as {parent.folder} ({own}): nothing to declare")
    if known := ancestors(child.folder, own.weights):
        raise InputError(child.folder / FILE, f"says already that it comes from {known[0]['name']!r}")
    problems = [f"{n} only in one" for n in sorted(set(child.names) ^ set(parent.names))]
    for name in sorted(set(child.names) & set(parent.names)):
        new, old = child.shape(name), parent.shape(name)
        if new != old and (new[1:] != old[1:] or name not in child.structure.embeddings):
            problems.append(f"{name} is {new}, the parent's {old}")
    if problems:
        raise InputError(child.folder, f"cannot descend from {parent.folder}: {'; '.join(problems)}")
    line = ancestors_for_child(parent.folder, parent_name, of_parent.as_dict())
    line[0]["declared"] = True
    record = {"format": FORMAT, "fingerprint": own.as_dict(), "ancestors": line}
    write_json(child.folder / FILE, record)
    return record
