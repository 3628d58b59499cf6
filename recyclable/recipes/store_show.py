"""`recyclable store show`: what one entry is; its files are not verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recyclable.recipes.store_list import named, row
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Stored
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import relation
from recyclable.weights.locate import locate
from recyclable.weights.manifest import Manifest
from recyclable.weights.store import Store
from recyclable.weights.strict_json import read_json


def show(store: Store, name: str, base: str | None = None) -> dict[str, Any]:
    """A row of `ls`, and what manifest and headers say besides.

    Args:
        base: a base to relate it to; the answer's `relation` is own, recorded, declared or None.

    Returns among others `lineage` (its base, then the base's ancestors), `mb` (10^6 bytes on disk), `compression`
    (bytes of the tuned weights over those) and `loss`: norm of what the codec lost over the norm of the tuned weights
    and of their difference from the base; `max_length` (tokens that texts are cut at), `config` (fields in which the
    model differs from its base), `tokenizer` (digest; None: the base's) and `chat_template` (whether that one has any).
    """
    folder = store.path(name)
    weights = AdaptedWeights(folder, verify=False)
    manifest = weights.manifest
    about = {
        **row(folder),
        "problem": manifest.task["problem"],
        "labels": manifest.task["labels"],
        "max_length": manifest.settings["max_length"],
        "config": manifest.config,
        "tokenizer": manifest.tokenizer["digest"] if manifest.tokenizer else None,
        "chat_template": _has_chat_template(folder, manifest),
        "base": manifest.base,
        "lineage": [named(each) for each in (manifest.base, *manifest.base.get("ancestors", ()))],
        "architecture": manifest.architecture,
        "recycled_from": manifest.recycled_from,
        "metrics": manifest.metrics,
        "compression": None,
        "loss": None,
    }
    if not weights.is_adapter:
        delta, storage = weights.delta, manifest.storage or {}
        tuned = sum(Stored(delta.tuned_dtype(n), delta.shape(n)).nbytes for n in delta.names)
        about["compression"] = (tuned + weights.head_bytes) / (about["mb"] * 1e6)
        about["loss"] = storage.get("loss") or ({"weights": 0.0, "difference": 0.0} if delta.codec == "exact" else None)
    if base is not None:
        opened = Base(locate(base))
        own = fingerprint(opened).weights
        about["relation"] = relation(opened.folder, own, manifest.base["fingerprint"]["weights"])
    return about


def _has_chat_template(folder: Path, manifest: Manifest) -> bool | None:
    """Whether a tokenizer of the weights' own says how a conversation is written as a text; None without such a one."""
    if manifest.tokenizer is None:
        return None
    files = set(manifest.tokenizer["files"])
    beside = any(name.startswith(("chat_template.", "additional_chat_templates/")) for name in files)
    settings = folder / "tokenizer_config.json"
    return beside or (settings.name in files and read_json(settings).get("chat_template") is not None)
