"""What comes into the store: a checkpoint tuned elsewhere and its base, a PEFT adapter, or one of our own runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from peft import TaskType
from transformers import PretrainedConfig

from recyclable.adapters.configs import read_adapter_config
from recyclable.architectures.fields import differing_fields
from recyclable.architectures.names import canonical_name
from recyclable.architectures.structure import label_tensors
from recyclable.carrying.labels import require_same_labels
from recyclable.carrying.places import adapter_base_name, canonical_names
from recyclable.errors import InputError
from recyclable.models.adapters import require_adapter_fits
from recyclable.models.build import auto_class, structure
from recyclable.models.tasks import task_structure
from recyclable.tasks import every_kind
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task import Task
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.base import Base, read_config
from recyclable.weights.checkpoint_files import Ranged, SafetensorsFile, TensorFiles
from recyclable.weights.convert import Restored, loss, require_effect, split
from recyclable.weights.delta import Codec, Delta, write_delta
from recyclable.weights.digest import Digested
from recyclable.weights.files import write_safetensors
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.limits import positions
from recyclable.weights.lineage import described
from recyclable.weights.locate import locate
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, DELTA, HEAD, MANIFEST, Manifest
from recyclable.weights.provenance import require_own_base
from recyclable.weights.vocabulary import align

SEED, MAX_LENGTH = 20, 128
"""Settings of weights that came without any."""
_MAX_LABELS = 1 << 20
_AUTO: dict[str, Any] = {
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: transformers.AutoModel,
}


def import_weights(
    tuned: Path, base: str | None, into: Path, *, name: str, codec: Codec | None, task: Task | None
) -> None:
    """Fill a directory with adapted weights made from whatever `tuned` is.

    Args:
        base: the base it was tuned on; only for a run of recyclable's that keeps its codec it may be None.
        name: what the task is called where nothing else names it.
        codec: how a delta is stored; None is exact, or as a run of recyclable's has it.

    Raises InputError.
    """
    if not tuned.is_dir():
        raise InputError("--tuned", f"{tuned} is no directory")
    if (tuned / MANIFEST).is_file():
        return _own_run(tuned, base, into, codec, task)
    if base is None:
        raise InputError("--base", f"is missing; {tuned} does not say which base it was tuned on")
    opened = Base(locate(base))
    if any((tuned / file).exists() for file in (ADAPTER_CONFIG, ADAPTER, "adapter_model.bin")):
        if codec is not None:
            raise InputError("--codec", f"is for deltas, and {tuned} is an adapter")
        return _adapter(tuned, opened, base, into, name, task)
    return _checkpoint(tuned, opened, base, into, name, codec or Codec(), task)


def _own_run(tuned: Path, base: str | None, into: Path, codec: Codec | None, task: Task | None) -> None:
    weights, opened = AdaptedWeights(tuned), Base(locate(base)) if base else None
    if task is not None:
        require_same_labels(weights, task)
    if opened:
        require_own_base(weights, opened)
    manifest = weights.manifest
    for file in manifest.files:
        shutil.copyfile(tuned / file, into / file)
    if codec is not None:
        if weights.is_adapter:
            raise InputError("--codec", f"is for deltas, and {tuned} is an adapter")
        if opened is None:
            raise InputError("--base", "is missing; another codec needs the base")
        manifest = replace(manifest, storage=_encode(into, Restored(weights.delta, opened), opened, codec))
    write_manifest(into, manifest)


def _checkpoint(
    tuned: Path, base: Base, base_name: str, into: Path, name: str, codec: Codec, task: Task | None
) -> None:
    config = read_config(tuned)
    if type(config) is not type(base.config):
        raise InputError(tuned, f"is a {config.model_type}, its base {base.folder} a {base.config.model_type}")
    if any((tuned / file).is_file() for file in ("tokenizer.json", "vocab.txt", "tokenizer.model")):
        rows = align(base, Base(tuned))
        if not rows.unchanged:
            raise InputError(tuned, f"has another vocabulary than {base.folder}: {rows}")
    architecture = next(iter(config.architectures or []), None)
    plan = structure(config, auto_class((task.kind if task else TaskKind).model_class), architecture)
    shapes = {canonical_name(n, base.prefix): tuple(p.shape) for n, p in plan.named_parameters()}
    tied = {canonical_name(n, base.prefix) for n, _ in plan.named_parameters(remove_duplicate=False)} - shapes.keys()
    backbone = {n for n, _ in plan.base_model.named_parameters() if not n.startswith("pooler.")}
    body, head = split(TensorFiles(tuned), base, shapes, backbone, tied)
    other = [f"{f} is {ours!r}, the base's {its!r}" for f, (ours, its) in differing_fields(config, base.config).items()]
    if other:
        raise InputError(tuned / "config.json", f"is not its base's: {'; '.join(other)}")
    write_safetensors(into / HEAD, {n: (head.stored(n).dtype, head.shape(n)) for n in head.names}, head.items())
    storage = _encode(into, body, base, codec)
    labels = [str(config.id2label[i]) for i in sorted(config.id2label)] if config.num_labels > 1 else []
    kind = _kind_of_class(type(plan).__name__, labels)
    about = {"kind": "delta", "tuning": {"tuning": "full"}, "architecture": architecture, "storage": storage}
    _finish(into, base, base_name, _task(name, kind, labels, task), about)


def _kind_of_class(architecture: str, labels: list[str]) -> TaskKind:
    """The kind of task that a class of transformers is for; where several have its head, by the number of labels."""
    fitting = [kind for kind in every_kind() if architecture.endswith(f"For{kind.model_class}")] or every_kind()
    return next((kind for kind in fitting if kind.has_labels == bool(labels)), fitting[0])


def _encode(into: Path, tuned: Ranged, base: Base, codec: Codec) -> dict[str, Any]:
    """Write the delta; returns what the manifest says of the codec and of its loss."""
    write_delta(into / DELTA, tuned, base, codec)
    lost = loss(Delta(Digested(SafetensorsFile(into / DELTA))), tuned, base)
    return {"codec": codec.name, "rank": codec.rank if codec.name == "lowrank" else None, "loss": lost}


def _adapter(tuned: Path, base: Base, base_name: str, into: Path, name: str, task: Task | None) -> None:
    if not (tuned / ADAPTER).is_file() and (tuned / "adapter_model.bin").exists():
        raise InputError(tuned, f"only found adapter_model.bin (pickle, never loaded); expected {ADAPTER}")
    peft_config, file = read_adapter_config(tuned), SafetensorsFile(tuned / ADAPTER)
    if not file.names:
        raise InputError(tuned, "holds no tensors: an adapter without effect")
    plain = {n: adapter_base_name(n, base) for n in file.names}
    task_type = peft_config.task_type
    wanted = task_type or (task.kind if task else TaskKind).task_type
    kinds = [kind for kind in every_kind() if kind.task_type == wanted]
    if kinds:
        per_label = label_tensors(base.config, auto_class(kinds[0].model_class))
        heads = [file.shape(n)[0] for n in file.names if plain[n] in per_label and file.shape(n)]
        count = heads[0] if heads else len(task.labels) or 1 if task else 2
        if count > _MAX_LABELS:
            raise InputError(tuned / ADAPTER, f"has a head for {count} labels, expected at most {_MAX_LABELS}")
        labels = [f"LABEL_{i}" for i in range(count)] if count > 1 else []
        kind = next((kind for kind in kinds if kind.has_labels == bool(labels)), kinds[0])
        about = _task(name, kind, labels, task)
    else:
        about = {"name": task.name if task else name, "problem": str(task_type).lower(), "labels": [], "digest": None}
    architecture = _architecture(base.config, task_type, tuned)
    names = canonical_names(task_structure(base.folder, about, architecture))
    require_adapter_fits(tuned, file, task_structure(base.folder, about, architecture))
    whole = [n for n in file.names if plain[n] in names]
    require_effect(tuned, file, whole)
    held = {canonical_name(n, base.prefix) for n in TensorFiles(base.folder).names} | {plain[n] for n in whole}
    if fresh := sorted(names.keys() - held):
        raise InputError(
            tuned,
            f"needs {', '.join(fresh)}, which neither it nor {base.folder} holds: drawn at random when it was tuned, "
            "they belong in modules_to_save",
        )
    for part in (ADAPTER, ADAPTER_CONFIG):
        shutil.copyfile(tuned / part, into / part)
    origin = {"kind": "adapter", "tuning": {"tuning": "peft"}, "architecture": architecture}
    _finish(into, base, base_name, about, origin)


def _architecture(config: PretrainedConfig, task_type: str | None, tuned: Path) -> str | None:
    """The class of transformers for an adapter's kind of task; None is the one that the kind has."""
    if task_type not in _AUTO:
        return None
    try:
        found = _AUTO[task_type]._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(tuned / ADAPTER_CONFIG, f"task_type is {task_type}, not for {config.model_type}") from error
    return (found[0] if isinstance(found, tuple) else found).__name__


def _task(name: str, kind: TaskKind, labels: list[str], task: Task | None) -> dict[str, Any]:
    """What the manifest says of the task: the given one's names for the labels, where the weights have none."""
    if task is None:
        return {"name": name, "problem": kind.name, "labels": labels, "digest": None}
    if task.kind.model_class != kind.model_class:
        raise InputError("--task", f"{task.name} is {task.problem}, the weights are of a model for {kind.name}")
    wanted = list(task.labels)
    if len(wanted) != len(labels) or (wanted != labels and labels != [f"LABEL_{i}" for i in range(len(labels))]):
        raise InputError(
            "--task", f"{task.name} has labels {wanted}, the weights {labels}: expected the same, in order"
        )
    return {"name": task.name, "problem": task.problem, "labels": wanted, "digest": task.digest}


def _finish(into: Path, base: Base, base_name: str, task: dict[str, Any], about: dict[str, Any]) -> None:
    settings = {"seed": SEED, "max_length": min(MAX_LENGTH, positions(base.folder) or MAX_LENGTH)}
    recorded = described(base.folder, base_name, fingerprint(base).as_dict())
    manifest = Manifest(task=task, base=recorded, method="import", metrics={}, history=[], settings=settings, **about)
    write_manifest(into, manifest)
