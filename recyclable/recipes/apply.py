"""`recyclable apply`: outdated weights onto a base without training, streamed into a directory that opens elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recyclable import distributed
from recyclable.architectures.names import canonical_name
from recyclable.architectures.structure import saved_buffers
from recyclable.carrying.carried import Carried
from recyclable.carrying.changes import FoundChanges
from recyclable.carrying.labels import in_order
from recyclable.carrying.places import canonical_names
from recyclable.carrying.putting import merged
from recyclable.carrying.scaling import Strength
from recyclable.carrying.starts import start
from recyclable.carrying.templates import told_template
from recyclable.carrying.trials import Trials
from recyclable.carrying.writing import AdapterOnBase, write_adapter
from recyclable.data.examples import TaskExamples
from recyclable.errors import InputError
from recyclable.models.adapters import require_adapter_fits
from recyclable.models.tasks import carried_fields, fresh_model, task_structure
from recyclable.recipes.cards import card_of_weights
from recyclable.recipes.leaving import require_opens, write_generation, write_tokenizer
from recyclable.report.model_card import write_card
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import few_examples, unseen_split
from recyclable.weights.adapted import require_same_model, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Computed, SafetensorsFile
from recyclable.weights.delta import Delta
from recyclable.weights.differences import Differences
from recyclable.weights.durable import new_directory, write_json
from recyclable.weights.files import MAX_SHARD_BYTES, write_checkpoint
from recyclable.weights.layouts import as_saved
from recyclable.weights.lineage import described
from recyclable.weights.locate import locate
from recyclable.weights.manifest import ADAPTER, HEAD
from recyclable.weights.sources import Read, held

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROVENANCE = "recycled.json"
_EXAMPLES = 128


def apply(
    weights: Sequence[str | Path],
    base: str | Path,
    out: Path,
    changes: FoundChanges,
    *,
    old_base: str | Path | None = None,
    seed: int = 20,
    allow_unrelated: bool = False,
    task: str | None = None,
    examples: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Put adapted weights on `base`: their own base or a descendant, however many upgrades later.

    Deltas become a plain transformers directory (several are merged, the head is the first's), an adapter a plain PEFT
    directory. A few MiB are in memory at a time. What is read is hashed on the way: where it is not what manifest and
    lineage say, or the base is none the weights may go on, the directory does not come into being.

    Args:
        old_base: the weights' own base, where the recorded names for it lead nowhere and it is needed.
        task: where the scale is auto, the task on which it is found.
        examples: how many of its dev examples (training examples where there is no dev) are used at most; 128 if None.

    Returns what `recycled.json` says. Raises InputError.
    """
    if (changes.scale == "auto") != (task is not None):
        lacking = "is missing, scale auto is found on a task"
        raise InputError("task", lacking if task is None else f"is {task}, only scale auto needs it")
    if examples is not None and task is None:
        raise InputError("examples", "is given, but nothing reads it without a task")
    if changes.align is not None and not allow_unrelated:
        raise InputError("align", f"is {changes.align}, for bases that are not related: allow them as well")
    count = _EXAMPLES if examples is None else examples
    new = Base(locate(base))
    several = [Carried.open(each, old_base, new, allow_unrelated=allow_unrelated) for each in weights]
    first = several[0]
    few = _few_examples(first, load_task(task), count, seed) if task is not None else None
    record: dict[str, Any] = {"format": 1, "settings": {**changes.model_dump(), "seed": seed}}
    adapters = any(carried.weights.is_adapter for carried in several)
    if adapters and len(several) > 1:
        hint = f"{len(several)} weights with an adapter among them, only deltas can be merged"
        raise InputError(first.weights.folder, hint)
    for other in several[1:]:
        require_same_model(other.weights, first.weights)
    try:
        with new_directory(out) as aside:
            if adapters:
                differences = _adapter_differences(first, changes, few, seed, record)
                _tell_moved_rows(several, record)
                fields, on_new = first.moved_indices(), AdapterOnBase(first, differences)
                require_adapter_fits(first.weights.folder, on_new, _structure(first), new, fields)
                write_adapter(first, differences, aside, str(base))
                write_tokenizer(first, aside)
                write_generation(first, _structure(first), aside)
            else:
                differences = merged(several, changes, seed)
                if few is not None:
                    differences = _found(first, differences, few, seed, record)
                _tell_moved_rows(several, record)
                _write_model(first, differences, aside, max_shard_bytes)
            verified = [carried.verify() for carried in several]
            record["base"] = described(new.folder, str(base), verified[0][0].as_dict())
            pairs = zip(several, verified, strict=True)
            record["weights"] = [_origin(carried, relation) for carried, (_, relation) in pairs]
            if adapters:
                _write_manifest(first, record, aside)
                plan = _structure(first)
                config, architecture = plan.config, type(plan).__name__
                require_adapter_fits(aside, SafetensorsFile(aside / ADAPTER), plan, new)
            else:
                config = require_opens(aside)
                (architecture,) = config.architectures
            write_card(card_of_weights(out.name, several, record, config, architecture, merged=not adapters), aside)
            write_json(aside / PROVENANCE, record)
    except FileExistsError as error:
        raise InputError(out, "exists and is not empty, expected a new directory") from error
    except InputError:
        for carried in several:
            carried.verify()  # weights fit no other base than theirs: where it is another, that is what is wrong
        raise
    return record


def _origin(carried: Carried, relation: str) -> dict[str, Any]:
    manifest = carried.weights.manifest
    told = {"base": manifest.base, "task": manifest.task, "files": manifest.files}
    return {"weights": str(carried.weights.folder), "relation": relation, **told, **told_template(carried)}


def _tell_moved_rows(several: Sequence[Carried], record: dict[str, Any]) -> None:
    """Notes in the record, and tells, how rows were aligned where the vocabularies differ."""
    for carried in several:
        if carried.rows is not None:
            record["vocabulary"] = carried.rows.as_dict()
            distributed.say(f"notice: {carried.weights.folder}: {carried.rows}")


def _few_examples(carried: Carried, task: Task, count: int, seed: int) -> tuple[Task, TaskExamples]:
    """What a strength is found on; InputError when the weights' head is not for the task's labels."""
    task = in_order(carried.weights, task)
    if count < 1:
        raise InputError("examples", f"found {count}, expected at least 1")
    length = carried.weights.manifest.settings["max_length"]
    return task, few_examples(task, carried.reader, length, count, seed, split=unseen_split(task))


def _found(
    carried: Carried, differences: Differences, few: tuple[Task, TaskExamples], seed: int, record: dict[str, Any]
) -> Differences:
    """The differences at the best strength, one for each layer group, by forward passes of this process."""
    task, examples = few
    alone: dict[str, Any] = {}
    trials = Trials(fresh_model(carried, task, seed), task, carried, differences)
    trials.materialize(alone)
    with trials.asked(alone):
        scales, record["strength"] = trials.strengths(examples, by_layer=True)
    return trials.strength.at(scales)


def _adapter_differences(
    carried: Carried,
    changes: FoundChanges,
    few: tuple[Task, TaskExamples] | None,
    seed: int,
    record: dict[str, Any],
) -> Differences:
    """The adapter's differences, at a strength where one is wanted."""
    if changes.model_copy(update={"scale": 1.0}).changes_start():
        raise InputError(carried.weights.folder, "is an adapter: ties, dare, skip_embeddings and align are for deltas")
    differences = carried.adapter_differences()
    if few is not None:
        return _found(carried, differences, few, seed, record)
    if changes.known_scale() == 1.0:
        return differences
    strength = Strength(carried, differences)
    return strength.at(dict.fromkeys(strength.names, changes.known_scale()))


def _write_model(carried: Carried, differences: Differences, aside: Path, max_shard_bytes: int) -> None:
    """Base plus differences, and the head, as a plain transformers directory."""
    weights, new = carried.weights, carried.new
    plan = _structure(carried)
    names, head = canonical_names(plan), weights.file(HEAD)
    missing = [n for n in differences.names if n not in new or differences.shape(n) != new.shape(n)]
    # A base's tensors that a task's model has no place for stay behind: its head, a decoder that it does not need.
    homeless = sorted((set(differences.names) | set(head.names)) - names.keys())
    absent = sorted(names.keys() - set(head.names) - (set(new.names) & set(differences.names)))
    wrong = [n for n in head.names if n in names and head.shape(n) != tuple(plan.get_parameter(names[n]).shape)]
    if missing or homeless or absent or wrong:
        problems = [f"{n} is {differences.shape(n)}, not in the new base with that shape" for n in missing]
        problems += [f"{n} has no place in the model" for n in homeless] + [f"{n} is missing" for n in absent]
        problems += [f"{n} is {head.shape(n)}, not the shape of the model's" for n in wrong]
        raise InputError(weights.folder, f"does not fit {new.folder}: {'; '.join(problems)}")
    exact, changed = carried.own and isinstance(differences, Delta), set(differences.names)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    reads: dict[str, Read] = {}
    for name, own_name in names.items():
        source = head if name in head else new
        dtype = weights.delta.tuned_dtype(name) if exact and name in changed else source.stored(name).dtype
        layout[own_name] = (dtype, source.shape(name))
        added = partial(start, new.hashed, differences, name, own=carried.own)
        reads[own_name] = partial(head.read, name) if name in head else added
    for name, buffer in saved_buffers(plan).items():
        layout[name] = (buffer.dtype, tuple(buffer.shape))
        name_in_base = canonical_name(name, new.prefix)
        reads[name] = partial(new.hashed.read, name_in_base) if name_in_base in new else held(buffer)
    values = Computed(layout, lambda name, begin, end: reads[name](begin, end))
    write_checkpoint(aside, as_saved(plan, values), max_shard_bytes=max_shard_bytes, label="apply")
    plan.config.dtype = layout[next(iter(layout))][0]
    write_generation(carried, plan, aside)
    plan.config.save_pretrained(aside)
    write_tokenizer(carried, aside)


def _structure(carried: Carried) -> PreTrainedModel:
    manifest = carried.weights.manifest
    return task_structure(carried.new.folder, manifest.task, manifest.architecture, carried_fields(carried))


def _write_manifest(carried: Carried, record: dict[str, Any], aside: Path) -> None:
    """An adapter on the new base is adapted weights of the new base."""
    origin = {**record["weights"][0], **{key: record[key] for key in ("settings", "strength") if key in record}}
    changed = {
        "base": record["base"],
        "config": carried_fields(carried),
        "method": "apply",
        "recycled_from": origin,
        "metrics": {},
        "history": [],
    }
    write_manifest(aside, replace(carried.weights.manifest, **changed))
