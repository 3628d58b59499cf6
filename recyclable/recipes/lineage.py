"""`recyclable lineage`: where a base comes from; adopting bases that were upgraded elsewhere."""

from __future__ import annotations

from typing import Any

from recyclable.weights import lineage
from recyclable.weights.locate import locate
from recyclable.weights.remembered import recall, remember, stamp


def show(base: str) -> dict[str, Any]:
    """Fingerprint and ancestors of a base, nearest first; none where its lineage was written for other weights.

    The fingerprint is that of last time where no file has changed since: nothing slow is imported or read then.
    """
    folder = locate(base)
    if (own := recall(folder)) is None:
        from recyclable.weights.base import Base
        from recyclable.weights.fingerprint import fingerprint

        before = stamp(folder)
        own = fingerprint(Base(folder)).as_dict()
        remember(folder, before, own)
    return {"base": base, "fingerprint": own, "ancestors": lineage.ancestors(folder, own["weights"])}


def declare(base: str, parent: str) -> dict[str, Any]:
    """Record the user's claim that `base` descends from `parent`; returns the lineage that was written."""
    from recyclable.weights.base import Base

    folders = locate(base), locate(parent)
    before = [stamp(folder) for folder in folders]
    child, older = (Base(folder) for folder in folders)
    record = lineage.declare(child, older, parent)
    for folder, stamped, of in zip(folders, before, (record, record["ancestors"][0]), strict=True):
        remember(folder, stamped, of["fingerprint"])
    return record
