"""What comes into the store: a checkpoint tuned elsewhere and its base, a PEFT adapter, or one of our own runs.

A tuned model is weights, config, tokenizer, labels and length (`recipes.tuned_elsewhere`): all of it comes along.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from peft import TaskType
from transformers import PretrainedConfig

from recyclable.adapters.configs import read_adapter_config
from recyclable.architectures.names import canonical_name
from recyclable.architectures.pooling import class_for
from recyclable.architectures.structure import Structure, label_tensors
from recyclable.carrying.labels import in_order
from recyclable.carrying.places import adapter_base_name, canonical_names
from recyclable.errors import InputError
from recyclable.models.adapters import require_adapter_fits
from recyclable.models.build import auto_class, structure
from recyclable.models.effect import require_effect
from recyclable.models.tasks import task_structure
from recyclable.recipes.label_order import require_order
from recyclable.recipes.tuned_elsewhere import (
    Told,
    changed_fields,
    config_of,
    cut_at,
    keep_tokenizer,
    label_names,
    own_generation,
    rows_used,
    tokenizer_with,
)
from recyclable.tasks import KINDS, every_kind
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task import Task
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.base import Base, read_config
from recyclable.weights.checkpoint_files import Ranged, SafetensorsFile
from recyclable.weights.convert import Places, Restored, loss, split
from recyclable.weights.delta import Codec, Delta, write_delta
from recyclable.weights.digest import Digested
from recyclable.weights.durable import copy_files
from recyclable.weights.files import write_safetensors
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.layouts import model_files
from recyclable.weights.lineage import described
from recyclable.weights.locate import inside, locate
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, DELTA, FILES, HEAD, MANIFEST, Manifest
from recyclable.weights.provenance import require_own_base
from recyclable.weights.reader import Reader

SEED = 20
"""Of weights that came without one."""
_MAX_LABELS = 1 << 20
_AUTO: dict[str, Any] = {
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: transformers.AutoModel,
}


def import_weights(
    tuned: Path, base: str | None, into: Path, *, name: str, codec: Codec | None, task: Task | None, told: Told
) -> None:
    """Fill a directory with adapted weights made from whatever `tuned` is.

    Args:
        base: the base it was tuned on; only for a run of recyclable's that keeps its codec it may be None.
        name: what the task is called where nothing else names it.
        codec: how a delta is stored; None is exact, or as a run of recyclable's has it.
        told: what its files do not say; a run of recyclable's says everything.

    Raises InputError.
    """
    if not tuned.is_dir():
        raise InputError("--tuned", f"{tuned} is no directory")
    if (tuned / MANIFEST).is_file():
        for field, value in vars(told).items():
            if value is not None:
                raise InputError(
                    f"--{field.replace('_', '-')}", f"is given, but {tuned} has a {MANIFEST}, which says it"
                )
        return _own_run(tuned, base, into, codec, task)
    if base is None:
        raise InputError("--base", f"is missing; {tuned} does not say which base it was tuned on")
    opened = Base(locate(base))
    if any((tuned / file).exists() for file in (ADAPTER_CONFIG, ADAPTER, "adapter_model.bin")):
        if codec is not None:
            raise InputError("--codec", f"is for deltas, and {tuned} is an adapter")
        return _adapter(tuned, opened, base, into, name, task, told)
    if not (tuned / "config.json").is_file():
        hint = inside(tuned, "config.json", ADAPTER_CONFIG)
        raise InputError(tuned, f"has neither config.json nor {ADAPTER_CONFIG}, expected one of them{hint}")
    return _checkpoint(tuned, opened, base, into, name, codec or Codec(), task, told)


def _own_run(tuned: Path, base: str | None, into: Path, codec: Codec | None, task: Task | None) -> None:
    weights, opened = AdaptedWeights(tuned), Base(locate(base)) if base else None
    if task is not None:
        in_order(weights, task)
    if opened:
        require_own_base(weights, opened)
    manifest = weights.manifest
    copy_files(tuned, into, manifest.files)
    if codec is not None:
        if weights.is_adapter:
            raise InputError("--codec", f"is for deltas, and {tuned} is an adapter")
        if opened is None:
            raise InputError("--base", "is missing; another codec needs the base")
        storage = _encode(into, Restored(weights.delta, opened), opened, codec, weights.delta.untouched)
        manifest = replace(manifest, storage=storage)
    write_manifest(into, manifest)


def _checkpoint(
    tuned: Path, base: Base, base_name: str, into: Path, name: str, codec: Codec, task: Task | None, told: Told
) -> None:
    config = read_config(tuned)
    fields = changed_fields(config, base, tuned)
    reader = replace(tokenizer_with(tuned, config, base, told), padded_by_config=True)
    architecture = next(iter(config.architectures or []), None)
    auto = auto_class(task.kind.model_class_for(config) if task else TaskKind.model_class)
    plan, of_base = (structure(each, auto, architecture) for each in (config, copy.deepcopy(base.config)))
    used = rows_used(reader, base, told)
    body, head = split(model_files(tuned, Structure(config)), base, Places.of(plan), Places.of(of_base), used)
    kinds = [kind for kind in every_kind() if class_for(config, kind.model_class_for(config)) is type(plan)]
    found = _names(config) if config.num_labels > 1 and not _of_text(kinds) else []
    kind = _kind(kinds, config.problem_type, found, task)
    about = _task(name, kind, *label_names(found, told, task, tuned), task)
    write_safetensors(into / HEAD, {n: (head.stored(n).dtype, head.shape(n)) for n in head.names}, head.items())
    storage = _encode(into, body, base, codec)
    origin = {"kind": "delta", "tuning": {"tuning": "full"}, "architecture": architecture, "storage": storage}
    fields |= _head_fields(config, kind) | own_generation(tuned, base)
    _finish(into, base, base_name, reader, told, fields, task=about, **origin)
    _require_order(into, base, about, task, tuned)


def _of_text(kinds: list[TaskKind]) -> bool:
    """Whether a model of these kinds has a language-model head, whose rows are tokens and no labels."""
    return bool(kinds) and all(kind.over_vocabulary for kind in kinds)


def _kind(of_class: list[TaskKind], problem_type: str | None, labels: list[str], task: Task | None) -> TaskKind:
    """The kind of task that a tuned model is for, by its config's `problem_type` and its labels.

    A task's kind goes first, where it has such a head. Raises InputError where it has not.

    Args:
        of_class: those that its class in transformers has the head for; none: it may be any.
    """
    of_class = of_class or every_kind()
    fitting = [kind for kind in of_class if problem_type in (None, kind.problem_type)]
    fitting = [kind for kind in fitting or of_class if kind.has_labels == bool(labels)] or fitting or of_class
    if task is None:
        return max(fitting, key=lambda kind: kind.assumed)
    if task.problem not in [kind.name for kind in fitting]:
        problem = f"{task.name} is {task.problem}, the weights are of a model for {fitting[0].name}"
        raise InputError("--task", problem)
    return task.kind


def _names(config: PretrainedConfig) -> list[str]:
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def _head_fields(config: PretrainedConfig, kind: TaskKind) -> dict[str, Any]:
    """What the tuned config says of its head, where its kind of task would have said something else.

    Of several classes no problem type is the one of a single label; names of classes are the manifest's labels.
    """
    said, names = config.problem_type, config.id2label
    found = {} if said == kind.problem_type or (said is None and len(names) > 1) else {"problem_type": said}
    return found if len(names) > 1 else {**found, "id2label": names, "label2id": config.label2id}


def _encode(
    into: Path, tuned: Ranged, base: Base, codec: Codec, untouched: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Write the delta; returns what the manifest says of the codec and of its loss."""
    write_delta(into / DELTA, tuned, base, codec, untouched=untouched)
    lost = loss(Delta(Digested(SafetensorsFile(into / DELTA))), tuned, base)
    return {"codec": codec.name, "rank": codec.rank if codec.name == "lowrank" else None, "loss": lost}


def _adapter(tuned: Path, base: Base, base_name: str, into: Path, name: str, task: Task | None, told: Told) -> None:
    if not (tuned / ADAPTER).is_file() and (tuned / "adapter_model.bin").exists():
        raise InputError(tuned, f"only found adapter_model.bin (pickle, never loaded); expected {ADAPTER}")
    peft_config, file = read_adapter_config(tuned), SafetensorsFile(tuned / ADAPTER)
    if not file.names:
        raise InputError(tuned, "holds no tensors: an adapter without effect")
    config = config_of(tuned)
    fields = {} if config is None else changed_fields(config, base, tuned)
    prompts = getattr(peft_config, "num_virtual_tokens", None) or 0
    reader = replace(tokenizer_with(tuned, base.config, base, told), prompts=prompts)
    plain = {n: adapter_base_name(n, base) for n in file.names}
    about = _adapter_task(tuned, base, file, plain, peft_config.task_type, config, name, task, told)
    if config is not None and config.num_labels == 1 and not about["labels"] and about["problem"] in KINDS.names():
        fields |= _head_fields(config, KINDS.get(about["problem"])())
    architecture = _architecture(base.config, peft_config.task_type, tuned)
    planned = partial(task_structure, base.folder, about, architecture, fields)
    names = canonical_names(planned())
    require_adapter_fits(tuned, file, planned(), base)
    require_effect(tuned, file, planned(), base)
    held = {canonical_name(n, base.prefix) for n in base.source.names} | set(plain.values())
    if fresh := sorted(names.keys() - held):
        raise InputError(
            tuned,
            f"needs {', '.join(fresh)}, which neither it nor {base.folder} holds: drawn at random when it was tuned, "
            "they belong in modules_to_save",
        )
    copy_files(tuned, into, FILES["adapter"])
    origin = {"kind": "adapter", "tuning": {"tuning": "peft"}, "architecture": architecture}
    fields |= own_generation(tuned, base)
    _finish(into, base, base_name, reader, told, fields, task=about, **origin)
    _require_order(into, base, about, task, tuned)


def _adapter_task(
    tuned: Path,
    base: Base,
    file: SafetensorsFile,
    plain: dict[str, str],
    task_type: str | None,
    config: PretrainedConfig | None,
    name: str,
    task: Task | None,
    told: Told,
) -> dict[str, Any]:
    """What the manifest says of an adapter's task: as many labels as its head has rows, by their names where known."""
    wanted = task_type or (task.kind.task_type_for(base.config) if task else TaskKind.task_type)
    kinds = [kind for kind in every_kind() if kind.task_type_for(base.config) == wanted]
    if not kinds:
        if told.labels is not None:
            raise InputError("--labels", f"is given, but nothing reads it for weights of kind {task_type}")
        return {"name": task.name if task else name, "problem": str(task_type).lower(), "labels": [], "digest": None}
    if _of_text(kinds):
        return _task(name, _kind(kinds, None, [], task), *label_names([], told, task, tuned), task)
    per_label = label_tensors(base.config, auto_class(kinds[0].model_class_for(base.config)))
    heads = [file.shape(n)[0] for n in file.names if plain[n] in per_label and file.shape(n)]
    known = told.labels if told.labels is not None else task.labels if task is not None else None
    count = heads[0] if heads else base.config.num_labels if known is None else len(known) or 1
    if count > _MAX_LABELS:
        raise InputError(tuned / ADAPTER, f"has a head for {count} labels, expected at most {_MAX_LABELS}")
    found = [f"LABEL_{i}" for i in range(count)] if count > 1 else []
    names = base.config if config is None and not heads else config  # a head that is not the adapter's is the base's
    if names is not None and names.num_labels == count > 1:
        found = _names(names)
    kind = _kind(kinds, config and config.problem_type, found, task)
    return _task(name, kind, *label_names(found, told, task, tuned), task)


def _architecture(config: PretrainedConfig, task_type: str | None, tuned: Path) -> str | None:
    """The class of transformers for an adapter's kind of task; None is the one that the kind has."""
    if task_type not in _AUTO:
        return None
    try:
        found = _AUTO[task_type]._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(tuned / ADAPTER_CONFIG, f"task_type is {task_type}, not for {config.model_type}") from error
    return (found[0] if isinstance(found, tuple) else found).__name__


def _task(name: str, kind: TaskKind, labels: list[str], giver: str, task: Task | None) -> dict[str, Any]:
    """What the manifest says of the task, and who named its labels."""
    told = {"name": name, "digest": None} if task is None else {"name": task.name, "digest": task.digest}
    return {**told, "problem": kind.name, "labels": labels, "labels_from": giver}


def _require_order(into: Path, base: Base, about: dict[str, Any], task: Task | None, tuned: Path) -> None:
    """InputError where a task that has no order of its own gave names to rows that are in another."""
    if task is not None and not task.ordered and about.get("labels_from") == "task":
        require_order(into, base, task, tuned)


def _finish(
    into: Path, base: Base, base_name: str, reader: Reader, told: Told, fields: dict[str, Any], **about: Any
) -> None:
    known = about["task"]["problem"] in KINDS.names()
    head = KINDS.get(about["task"]["problem"])().model_class_for(base.config) if known else None
    manifest = Manifest(
        base=described(base.folder, base_name, fingerprint(base).as_dict()),
        method="import",
        metrics={},
        history=[],
        settings={"seed": SEED, "max_length": cut_at(reader, base, told)},
        config=fields if head is None else fields | reader.fields(head),
        tokenizer=keep_tokenizer(reader, base, into),
        **about,
    )
    write_manifest(into, manifest)
