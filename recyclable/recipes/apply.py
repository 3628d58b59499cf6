"""`recyclable apply`: outdated weights onto a base without training, streamed into a directory that opens elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recyclable import models
from recyclable.config import StartSettings
from recyclable.errors import InputError
from recyclable.weights.adapted import ADAPTER, ADAPTER_CONFIG, HEAD, AdaptedWeights, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.delta import Delta
from recyclable.weights.differences import Differences, require_alike
from recyclable.weights.digest import Digested, element_pieces, in_threads
from recyclable.weights.files import MAX_SHARD_BYTES, CheckpointWriter, new_directory, write_json, write_tensors
from recyclable.weights.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from recyclable.weights.provenance import claimed_fingerprint, require_descendant, require_own_base
from recyclable.weights.starts import carried, outdated_adapter, start, transformed
from recyclable.weights.vocabulary import copy_tokenizer, vocabulary_tensors

PROVENANCE = "recycled.json"


def apply(
    weights: Sequence[str | Path],
    base: str | Path,
    out: Path,
    settings: StartSettings,
    *,
    old_base: str | Path | None = None,
    seed: int = 20,
    allow_unrelated: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Put adapted weights on `base`: their own base or a descendant, however many upgrades later.

    Deltas become a plain transformers directory (several are merged, the head is the first's), an adapter a plain PEFT
    directory. A few MiB are in memory at a time. What is read is hashed on the way: where it is not what manifest and
    lineage say, or the base is none the weights may go on, the directory does not come into being.

    Args:
        old_base: the weights' own base, where the manifest's name for it leads nowhere and it is needed.

    Returns what `recycled.json` says. Raises InputError.
    """
    new = Base(models.locate(base))
    opened = [AdaptedWeights(folder, verify=False) for folder in weights]
    claimed = claimed_fingerprint(new)
    expected = claimed or _expected(opened, new, allow_unrelated)
    relations = [require_descendant(each, new, allow_unrelated, expected)[1] for each in opened]
    record: dict[str, Any] = {
        "format": 1,
        "base": {"name": str(base), "fingerprint": expected.as_dict()},
        "weights": [_origin(each, relation) for each, relation in zip(opened, relations, strict=True)],
        "settings": {**settings.model_dump(), "seed": seed},
    }
    try:
        with new_directory(out) as aside:
            read = Digested(new)
            if any(each.is_adapter for each in opened):
                _adapter(opened, new, read, aside, settings, old_base, record)
            else:
                differences = _differences(opened, new, settings, old_base, seed, record)
                _merged_model(opened[0], new, read, differences, relations[0] == "own", aside, max_shard_bytes)
            found = fingerprint(new, read)
            if found != expected:
                if claimed is None:
                    require_descendant(opened[0], new, found=found)
                    require_own_base(opened[0], new, found)
                raise InputError(new.folder, f"has fingerprint {found}, its lineage.json says {expected}")
            for each in opened:
                each.verify()
            write_json(aside / PROVENANCE, record)
    except FileExistsError as error:
        raise InputError(out, "exists and is not empty, expected a new directory") from error
    return record


def _expected(opened: Sequence[AdaptedWeights], new: Base, allow_unrelated: bool) -> Fingerprint:
    """A base without lineage can only be the weights' own, which the reading will show; or it is unrelated."""
    if allow_unrelated:
        return fingerprint(new)
    return require_own_base(opened[0], new, Fingerprint(**opened[0].manifest.base["fingerprint"]))


def _origin(weights: AdaptedWeights, relation: str) -> dict[str, Any]:
    manifest = weights.manifest
    told = {"base": manifest.base, "task": manifest.task, "files": manifest.files}
    return {"weights": str(weights.folder), "relation": relation, **told}


def _differences(
    opened: Sequence[AdaptedWeights],
    new: Base,
    settings: StartSettings,
    old_base: str | Path | None,
    seed: int,
    record: dict[str, Any],
) -> Differences:
    """What is added to the new base; notes in the record how rows were aligned."""
    tokenizer, several = tokenizer_digest(new), []
    for each in opened:
        changed = each.manifest.base["fingerprint"]["tokenizer"] != tokenizer
        differences, rows = carried(each, _old_base(each, old_base) if changed else None, new, tokenizer)
        several.append(differences)
        if rows is not None:
            record["vocabulary"] = {"added": list(rows.added), "dropped": list(rows.dropped)}
            print(f"notice: {each.folder}: {rows}", flush=True)
    require_alike(several, [each.folder for each in opened])
    left_out = vocabulary_tensors(new) if settings.skip_embeddings else frozenset()
    return transformed(several, left_out, seed=seed, **settings.model_dump(include={"scale", "ties", "dare"}))


def _old_base(weights: AdaptedWeights, named: str | Path | None) -> Base:
    """The base that the weights were tuned on, verified."""
    try:
        old = Base(models.locate(named or weights.manifest.base["name"]))
    except InputError as error:
        raise InputError(
            weights.folder, f"needs the base it was tuned on; name it with --old-base ({error})"
        ) from error
    require_own_base(weights, old)
    return old


def _merged_model(
    weights: AdaptedWeights,
    new: Base,
    read: Digested,
    differences: Differences,
    own: bool,
    aside: Path,
    max_shard_bytes: int,
) -> None:
    """Base plus differences, and the head, as a plain transformers directory."""
    config = models.task_config(new.folder, weights.manifest.task["labels"])
    plan = models.structure(config, architecture=weights.manifest.architecture)
    names = models.canonical_names(plan)
    head = weights.file(HEAD)
    missing = [n for n in differences.names if n not in new or differences.shape(n) != new.shape(n)]
    homeless = sorted((set(differences.names) | set(new.names) | set(head.names)) - names.keys())
    absent = sorted(names.keys() - set(head.names) - (set(new.names) & set(differences.names)))
    wrong = [n for n in head.names if n in names and head.shape(n) != tuple(plan.get_parameter(names[n]).shape)]
    if missing or homeless or absent or wrong:
        problems = [f"{n} is {differences.shape(n)}, not in the new base with that shape" for n in missing]
        problems += [f"{n} has no place in the model" for n in homeless] + [f"{n} is missing" for n in absent]
        problems += [f"{n} is {head.shape(n)}, not the shape of the model's" for n in wrong]
        raise InputError(weights.folder, f"does not fit {new.folder}: {'; '.join(problems)}")
    exact = own and isinstance(differences, Delta)
    layout = {}
    for name in names:
        source = head if name in head else new
        dtype = weights.delta.tuned_dtype(name) if exact and name in differences.names else source.stored(name).dtype
        layout[names[name]] = (dtype, source.shape(name))
    writer = CheckpointWriter(aside, layout, max_shard_bytes)
    changed, heads = set(differences.names), set(head.names)

    def piece(task: tuple[str, int, int]) -> None:
        name, begin, end = task
        if name in heads:
            values = head.read(name, begin, end)
        elif name in changed:
            values = start(read, differences, name, begin, end, None, own)
        else:
            values = read.read(name, begin, end)
        writer.write(names[name], values, begin)

    in_threads(piece, element_pieces({n: (head if n in heads else new).shape(n) for n in names}), label="apply")
    writer.close()
    config.dtype = layout[next(iter(layout))][0]
    config.save_pretrained(aside)
    copy_tokenizer(new.folder, aside)


def _adapter(
    opened: Sequence[AdaptedWeights],
    new: Base,
    read: Digested,
    aside: Path,
    settings: StartSettings,
    old_base: str | Path | None,
    record: dict[str, Any],
) -> None:
    """The adapter on the new base, in PEFT's format, with a manifest: it is adapted weights of the new base."""
    weights = opened[0]
    if len(opened) > 1:
        raise InputError(weights.folder, f"{len(opened)} weights with an adapter among them, only deltas can be merged")
    if settings.ties is not None or settings.dare is not None or settings.skip_embeddings:
        raise InputError(weights.folder, "is an adapter: ties, dare and skip_embeddings are for deltas")
    adapter = dict(weights.tensors(ADAPTER))
    base_name_of = {name: models.adapter_base_name(name, new) for name in adapter}
    if record["weights"][0]["relation"] != "own" and any(name in new for name in base_name_of.values()):
        adapter = outdated_adapter(_old_base(weights, old_base), read, adapter, base_name_of)
    if settings.scale != 1.0:
        if not any("lora_B" in name for name in adapter):
            raise InputError("scale", f"is {settings.scale}, but {weights.folder} is no LoRA: it has no strength")
        adapter = {n: t * settings.scale if "lora_B" in n else t for n, t in adapter.items()}
    write_tensors(aside / ADAPTER, adapter)
    peft_config = json.loads((weights.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    write_json(aside / ADAPTER_CONFIG, {**peft_config, "base_model_name_or_path": record["base"]["name"]})
    origin = {**record["weights"][0], "settings": record["settings"]}
    own = {"base": record["base"], "method": "apply", "recycled_from": origin, "metrics": {}, "history": []}
    write_manifest(aside, replace(weights.manifest, **own))
