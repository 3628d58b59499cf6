"""`recyclable store ls`: what is there, read off manifests and headers; no tensor, and nothing slow to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.weights.headers import read_header
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, DELTA, Manifest, read_manifest
from recyclable.weights.store import Store
from recyclable.weights.strict_json import read_json


def rows(store: Store) -> list[dict[str, Any]]:
    """A row per entry; an entry that cannot be read is said to be damaged."""
    found = []
    for name in store.names():
        try:
            found.append(row(store.path(name)))
        except InputError as error:
            found.append({"name": name, "task": f"damaged: {error}"})
    return found


def row(folder: Path) -> dict[str, Any]:
    """What an entry is; `mb` is 10^6 bytes on disk. Raises InputError where manifest or headers are broken."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        if not (folder / file).is_file():
            raise InputError(folder / file, "is missing, but the manifest lists it")
    return {
        "name": folder.name,
        "task": manifest.task["name"],
        "tuning": tuning(folder, manifest),
        "codec": codec(folder, manifest),
        "method": manifest.method,
        "score": manifest.metrics.get("test", {}).get(manifest.metrics.get("metric")),
        "base": named(manifest.base),
        "mb": sum(file.stat().st_size for file in folder.rglob("*")) / 1e6,
    }


def tuning(folder: Path, manifest: Manifest) -> str:
    """The kind of tuning; an adapter's as PEFT calls it."""
    if manifest.kind != "adapter":
        return manifest.tuning["tuning"]
    read_header(folder / ADAPTER)
    return str(read_json(folder / ADAPTER_CONFIG).get("peft_type")).lower()


def codec(folder: Path, manifest: Manifest) -> str | None:
    """How a delta is stored; None for an adapter."""
    if manifest.kind == "adapter":
        return None
    stored = read_header(folder / DELTA).metadata.get("codec", "fp32")
    rank = (manifest.storage or {}).get("rank")
    return f"lowrank {rank}" if rank else stored


def named(base: dict[str, Any]) -> str:
    """A base by name and the beginning of its fingerprint."""
    claimed = ", declared" if base.get("declared") else ""
    return f"{base['name']} ({base['fingerprint']['weights'][:12]}{claimed})"
