"""`recyclable store`: adapted weights by name; what comes in, what is there, whether it is whole, what goes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from recyclable import models
from recyclable.config import StartSettings
from recyclable.data.tasks import Task, load_task
from recyclable.errors import InputError
from recyclable.recipes.apply import PROVENANCE, apply
from recyclable.recipes.importing import import_weights
from recyclable.recipes.recycle import outdated_model
from recyclable.weights.adapted import ADAPTER_CONFIG, AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Stored
from recyclable.weights.delta import Codec
from recyclable.weights.files import CheckpointWriter, new_directory, write_json
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import relation
from recyclable.weights.sources import fill
from recyclable.weights.store import Store
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import copy_tokenizer


def add(
    store: Store, name: str, tuned: Path, base: str | None, *, codec: Codec | None = None, task: str | None = None
) -> dict[str, Any]:
    """Add what `tuned` holds (`recipes.importing`) as entry `name`; returns what `show` says of it."""
    with store.adding(name) as aside:
        import_weights(tuned, base, aside, name=name, codec=codec, task=load_task(task) if task else None)
    return show(store, name)


def rows(store: Store) -> list[dict[str, Any]]:
    """A row per entry, from its manifest; an entry that cannot be read is said to be damaged."""
    found = []
    for name in store.names():
        try:
            about = show(store, name)
        except InputError as error:
            found.append({"name": name, "task": f"damaged: {error}"})
            continue
        row = {key: about[key] for key in ("name", "task", "tuning", "codec", "method", "score")}
        row.update(base=about["lineage"][0], mb=about["mb"])
        found.append(row)
    return found


def show(store: Store, name: str, base: str | None = None) -> dict[str, Any]:
    """What an entry is; its files are not verified.

    Args:
        base: a base to relate it to; the answer's `relation` is own, recorded, declared or None.

    Returns among others `lineage` (its base, then the base's ancestors), `mb` (10^6 bytes on disk), `compression`
    (bytes of the tuned weights over those) and `loss`: norm of what the codec lost over the norm of the tuned weights
    and of their difference from the base.
    """
    folder = store.path(name)
    weights = AdaptedWeights(folder, verify=False)
    manifest = weights.manifest
    size = sum(file.stat().st_size for file in folder.iterdir())
    metric = manifest.metrics.get("metric")
    about = {
        "name": name,
        "task": manifest.task["name"],
        "problem": manifest.task["problem"],
        "labels": manifest.task["labels"],
        "base": manifest.base,
        "lineage": [_named(base) for base in (manifest.base, *manifest.base.get("ancestors", ()))],
        "method": manifest.method,
        "tuning": manifest.tuning["tuning"],
        "architecture": manifest.architecture,
        "recycled_from": manifest.recycled_from,
        "metrics": manifest.metrics,
        "score": manifest.metrics.get("test", {}).get(metric),
        "mb": size / 1e6,
        "codec": None,
        "compression": None,
        "loss": None,
    }
    if weights.is_adapter:
        about["tuning"] = str(read_json(folder / ADAPTER_CONFIG).get("peft_type")).lower()
    else:
        delta, storage = weights.delta, manifest.storage or {}
        tuned = sum(Stored(delta.tuned_dtype(n), delta.shape(n)).nbytes for n in delta.names)
        head = weights.head_bytes
        about["codec"] = f"lowrank {storage['rank']}" if storage.get("rank") else delta.codec
        about["compression"] = (tuned + head) / size
        about["loss"] = storage.get("loss") or ({"weights": 0.0, "difference": 0.0} if delta.codec == "exact" else None)
    if base is not None:
        opened = Base(models.locate(base))
        own = fingerprint(opened).weights
        about["relation"] = relation(opened.folder, own, manifest.base["fingerprint"]["weights"])
    return about


def _named(base: dict[str, Any]) -> str:
    claimed = ", declared" if base.get("declared") else ""
    return f"{base['name']} ({base['fingerprint']['weights'][:12]}{claimed})"


def verify(store: Store, names: list[str]) -> dict[str, list[str]]:
    """Entry -> what is damaged in it; of all entries if none is named."""
    return {name: store.damage(name) for name in names or store.names()}


def export(
    store: Store, name: str, base: str, out: Path, *, merged: bool, old_base: str | None, allow_unrelated: bool
) -> None:
    """Write an entry on `base`, its own or a descendant, as a plain transformers (merged) or a plain PEFT directory."""
    folder = store.path(name)
    adapter = AdaptedWeights(folder, verify=False).is_adapter
    settings, chosen = StartSettings(), {"old_base": old_base, "allow_unrelated": allow_unrelated}
    if adapter and merged:
        try:
            with new_directory(out) as aside:
                record = apply([folder], base, aside / "peft", settings, **chosen)
                _merge(AdaptedWeights(aside / "peft"), Base(models.locate(base)), aside)
                shutil.rmtree(aside / "peft")
                write_json(aside / PROVENANCE, record)
        except FileExistsError as error:
            raise InputError(out, "exists and is not empty, expected a new directory") from error
    elif adapter or merged:
        apply([folder], base, out, settings, **chosen)
    else:
        raise InputError(name, "is a delta of all weights and no adapter: expected --merged")


def _merge(weights: AdaptedWeights, base: Base, out: Path) -> None:
    """An adapter folded into its base by peft, in fp32, rounded once to the base's dtypes."""
    about = weights.manifest.task
    task = Task(about["name"], about["problem"], tuple(about["labels"]), {}, "")
    model = fill(outdated_model(weights, base, base, task, weights.manifest.settings["seed"]))
    try:
        merged = model.merge_and_unload()
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise InputError("--merged", f"peft cannot fold this kind of adapter into its base ({error})") from error
    names = models.canonical_names(merged)
    dtypes = {own: base.stored(n).dtype if n in base else merged.dtype for n, own in names.items()}
    writer = CheckpointWriter(out, {n: (dtype, tuple(merged.get_parameter(n).shape)) for n, dtype in dtypes.items()})
    for n, dtype in dtypes.items():
        writer.write(n, merged.get_parameter(n).detach().to(dtype))
    writer.close()
    merged.config.dtype = next(iter(dtypes.values()))
    merged.config.architectures = [type(merged).__name__]
    merged.config.save_pretrained(out)
    copy_tokenizer(base.folder, out)
