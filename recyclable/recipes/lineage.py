"""`recyclable lineage`: where a base comes from; adopting bases that were upgraded elsewhere."""

from __future__ import annotations

from typing import Any

from recyclable import models
from recyclable.weights import lineage
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint


def show(base: str) -> dict[str, Any]:
    """Fingerprint and ancestors of a base, nearest first; none where its lineage was written for other weights."""
    opened = Base(models.locate(base))
    own = fingerprint(opened)
    ancestors = lineage.ancestors(opened.folder, own.weights)
    return {"base": base, "fingerprint": own.as_dict(), "ancestors": ancestors}


def declare(base: str, parent: str) -> dict[str, Any]:
    """Record the user's claim that `base` descends from `parent`; returns the lineage that was written."""
    return lineage.declare(Base(models.locate(base)), Base(models.locate(parent)), parent)
