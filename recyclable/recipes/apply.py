"""`recyclable apply`: outdated weights onto a base without training, streamed into a directory that opens elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recyclable import models
from recyclable.analysis import permutation
from recyclable.config import StartSettings
from recyclable.data.tasks import Task, load_task
from recyclable.errors import InputError
from recyclable.objectives.labelled import LabelledTask
from recyclable.recipes.recycle import require_same_labels
from recyclable.recipes.training_free import Trials, few_examples, unseen_split
from recyclable.weights.adapted import ADAPTER, ADAPTER_CONFIG, HEAD, AdaptedWeights, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.delta import Delta
from recyclable.weights.differences import Differences, Scaled, require_alike
from recyclable.weights.digest import Digested, element_pieces, in_threads
from recyclable.weights.files import MAX_SHARD_BYTES, CheckpointWriter, new_directory, write_in_pieces, write_json
from recyclable.weights.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from recyclable.weights.lineage import described
from recyclable.weights.provenance import claimed_fingerprint, require_descendant, require_own_base
from recyclable.weights.starts import AdapterDifferences, carried, start, start_adapter, strength_tensors, transformed
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
    task: str | None = None,
    examples: int = 128,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Put adapted weights on `base`: their own base or a descendant, however many upgrades later.

    Deltas become a plain transformers directory (several are merged, the head is the first's), an adapter a plain PEFT
    directory. A few MiB are in memory at a time. What is read is hashed on the way: where it is not what manifest and
    lineage say, or the base is none the weights may go on, the directory does not come into being.

    Args:
        old_base: the weights' own base, where the manifest's name for it leads nowhere and it is needed.
        task: where the scale is auto, the task on which it is found.
        examples: how many of its dev examples (training examples where there is no dev) are used at most.

    Returns what `recycled.json` says. Raises InputError.
    """
    if (settings.scale == "auto") != (task is not None):
        problem = (
            "is missing, scale auto is found on a task" if task is None else f"is {task}, only scale auto needs it"
        )
        raise InputError("task", problem)
    if settings.align is not None and not allow_unrelated:
        raise InputError("align", f"is {settings.align}, for bases that are not related: allow them as well")
    new = Base(models.locate(base))
    opened = [AdaptedWeights(folder, verify=False) for folder in weights]
    search = task and _Search(opened[0], new, load_task(task), examples, seed)
    claimed = claimed_fingerprint(new)
    expected = claimed or _expected(opened, new, allow_unrelated)
    relations = [require_descendant(each, new, allow_unrelated, expected)[1] for each in opened]
    record: dict[str, Any] = {
        "format": 1,
        "base": described(new.folder, str(base), expected.as_dict()),
        "weights": [_origin(each, relation) for each, relation in zip(opened, relations, strict=True)],
        "settings": {**settings.model_dump(), "seed": seed},
    }
    try:
        with new_directory(out) as aside:
            read = Digested(new)
            if any(each.is_adapter for each in opened):
                _adapter(opened, new, read, aside, settings, old_base, record, search)
            else:
                differences = _differences(opened, new, settings, old_base, seed, record)
                if search:
                    scales, record["strength"] = search.scales(differences, new)
                    differences = Scaled(differences, scales)
                _merged_model(opened[0], new, read, differences, relations[0] == "own", aside, max_shard_bytes)
            found = fingerprint(new, read)
            if found != expected:
                raise InputError(new.folder, f"has fingerprint {found}, its lineage.json says {expected}")
            for each in opened:
                each.verify()
            write_json(aside / PROVENANCE, record)
    except FileExistsError as error:
        raise InputError(out, "exists and is not empty, expected a new directory") from error
    except InputError:
        if claimed is None and not allow_unrelated:  # taken for the weights' own base, it may be another
            require_descendant(opened[0], new)
            require_own_base(opened[0], new)
        raise
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
        if settings.align is not None:
            differences = permutation.align(differences, _old_base(each, old_base), new)
        several.append(differences)
        if rows is not None:
            record["vocabulary"] = rows.as_dict()
            print(f"notice: {each.folder}: {rows}", flush=True)
    require_alike(several, [each.folder for each in opened])
    left_out = vocabulary_tensors(new) if settings.skip_embeddings else frozenset()
    changes = {"scale": settings.known_scale(), "ties": settings.ties, "dare": settings.dare, "seed": seed}
    return transformed(several, left_out, **changes)


class _Search:
    """The best strength of each layer group, found on a few of a task's examples with forward passes only.

    Raises InputError when the weights' head is not for the task's labels.
    """

    def __init__(self, weights: AdaptedWeights, new: Base, task: Task, examples: int, seed: int) -> None:
        require_same_labels(weights, task)
        if examples < 1:
            raise InputError("examples", f"found {examples}, expected at least 1")
        length = weights.manifest.settings["max_length"]
        models.require_length(new.folder, length)
        self.weights, self.new = weights, new
        self.examples = few_examples(task, new.folder, length, examples, seed, split=unseen_split(task))
        self.model = models.attach_same(models.task_model(new, task, seed, None), weights, seed)

    def scales(self, differences: Differences, old: Base) -> tuple[dict[str, float], dict[str, Any]]:
        """Strength by tensor, and what the record says; `old` is the weights' own base (of a delta, any)."""
        trials = Trials(LabelledTask(self.model), self.weights, differences, old, self.new)
        return trials.strengths(self.examples, by_layer=True)


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
    search: _Search | None,
) -> None:
    """The adapter on the new base, in PEFT's format, with a manifest: it is adapted weights of the new base."""
    weights = opened[0]
    if len(opened) > 1:
        raise InputError(weights.folder, f"{len(opened)} weights with an adapter among them, only deltas can be merged")
    if settings.model_copy(update={"scale": 1.0}).changes_start():
        raise InputError(weights.folder, "is an adapter: ties, dare, skip_embeddings and align are for deltas")
    file, own = weights.file(ADAPTER), record["weights"][0]["relation"] == "own"
    config = models.task_config(new.folder, weights.manifest.task["labels"])
    models.require_adapter_fits(weights.folder, file, config, weights.manifest.architecture)
    old = _old_base(weights, old_base) if models.shared_with_base(weights, new, new) and not own else new
    shared = models.shared_with_base(weights, old, new)
    differences: Differences = AdapterDifferences(file, old.hashed, shared)
    if search:
        scales, record["strength"] = search.scales(differences, old)
        differences = Scaled(differences, scales)
    elif settings.scale != 1.0:
        differences = Scaled(differences, dict.fromkeys(strength_tensors(weights, differences), settings.scale))
    elif own:  # full values come back bit for bit only where nothing is subtracted from them
        differences, shared = AdapterDifferences(file, old.hashed, {}), {}
    layout = {name: (file.stored(name).dtype, file.shape(name)) for name in file.names}

    def piece(name: str, begin: int, end: int) -> torch.Tensor:
        return start_adapter(read, differences, name, shared.get(name), begin, end).to(layout[name][0])

    write_in_pieces(aside / ADAPTER, layout, piece)
    peft_config = json.loads((weights.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    write_json(aside / ADAPTER_CONFIG, {**peft_config, "base_model_name_or_path": record["base"]["name"]})
    origin = {**record["weights"][0], **{key: record[key] for key in ("settings", "strength") if key in record}}
    changed = {"base": record["base"], "method": "apply", "recycled_from": origin, "metrics": {}, "history": []}
    write_manifest(aside, replace(weights.manifest, **changed))
