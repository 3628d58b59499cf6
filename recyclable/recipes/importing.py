"""What comes into the store: a checkpoint tuned elsewhere and its base, a PEFT adapter, or one of our own runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from peft import TaskType
from transformers import PretrainedConfig

from recyclable import models
from recyclable.adapters.configs import read_adapter_config
from recyclable.data.tasks import Task
from recyclable.errors import InputError
from recyclable.recipes.recycle import require_same_labels
from recyclable.weights.adapted import (
    ADAPTER,
    ADAPTER_CONFIG,
    DELTA,
    HEAD,
    MANIFEST,
    AdaptedWeights,
    Manifest,
    write_manifest,
)
from recyclable.weights.base import Base, canonical_name, read_config
from recyclable.weights.checkpoint_files import Ranged, SafetensorsFile, TensorFiles
from recyclable.weights.convert import Restored, loss, require_effect, split
from recyclable.weights.delta import Codec, Delta, write_delta
from recyclable.weights.digest import Digested
from recyclable.weights.files import write_safetensors
from recyclable.weights.fingerprint import OUTPUT_FIELDS, fingerprint
from recyclable.weights.lineage import described
from recyclable.weights.provenance import require_own_base
from recyclable.weights.vocabulary import align

SEED, MAX_LENGTH = 20, 128
"""Settings of weights that came without any."""
_MAX_LABELS = 1 << 20
_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
_AUTO = {
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
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
    opened = Base(models.locate(base))
    if any((tuned / file).exists() for file in (ADAPTER_CONFIG, ADAPTER, "adapter_model.bin")):
        if codec is not None:
            raise InputError("--codec", f"is for deltas, and {tuned} is an adapter")
        return _adapter(tuned, opened, base, into, name, task)
    return _checkpoint(tuned, opened, base, into, name, codec or Codec(), task)


def _own_run(tuned: Path, base: str | None, into: Path, codec: Codec | None, task: Task | None) -> None:
    weights, opened = AdaptedWeights(tuned), Base(models.locate(base)) if base else None
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
    ours, its = config.to_dict(), base.config.to_dict()
    other = [f"{f} is {ours.get(f)!r}, the base's {its.get(f)!r}" for f in OUTPUT_FIELDS if ours.get(f) != its.get(f)]
    if other:
        raise InputError(tuned / "config.json", f"is not its base's: {'; '.join(other)}")
    if any((tuned / file).is_file() for file in ("tokenizer.json", "vocab.txt", "tokenizer.model")):
        rows = align(base, Base(tuned))
        if not rows.unchanged:
            raise InputError(tuned, f"has another vocabulary than {base.folder}: {rows}")
    architecture = next(iter(config.architectures or []), None)
    plan = models.structure(config, architecture=architecture)
    shapes = {canonical_name(n, base.prefix): tuple(p.shape) for n, p in plan.named_parameters()}
    tied = {canonical_name(n, base.prefix) for n, _ in plan.named_parameters(remove_duplicate=False)} - shapes.keys()
    backbone = {n for n, _ in plan.base_model.named_parameters() if not n.startswith("pooler.")}
    body, head = split(TensorFiles(tuned), base, shapes, backbone, tied)
    write_safetensors(into / HEAD, {n: (head.stored(n).dtype, head.shape(n)) for n in head.names}, head.items())
    storage = _encode(into, body, base, codec)
    labels = [str(config.id2label[i]) for i in sorted(config.id2label)] if config.num_labels > 1 else []
    problem = "classification" if labels else "regression"
    about = {"kind": "delta", "tuning": {"tuning": "full"}, "architecture": architecture, "storage": storage}
    _finish(into, base, base_name, _task(name, problem, labels, task), about)


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
    plain = {n: models.adapter_base_name(n, base) for n in file.names}
    heads = [file.shape(n)[0] for n in file.names if plain[n] in _HEADS and file.shape(n)]
    task_type = peft_config.task_type
    if task_type in (None, TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        count = heads[0] if heads else len(task.labels) or 1 if task else 2
        if count > _MAX_LABELS:
            raise InputError(tuned / ADAPTER, f"has a head for {count} labels, expected at most {_MAX_LABELS}")
        labels = [f"LABEL_{i}" for i in range(count)] if count > 1 else []
        about = _task(name, "classification" if labels else "regression", labels, task)
    else:
        about = {"name": task.name if task else name, "problem": str(task_type).lower(), "labels": [], "digest": None}
    config = models.task_config(base.folder, about["labels"])
    architecture = _architecture(config, task_type, tuned)
    names = models.canonical_names(models.structure(config, architecture=architecture))
    models.require_adapter_fits(tuned, file, config, architecture)
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


def _architecture(config: PretrainedConfig, task_type: TaskType | None, tuned: Path) -> str | None:
    """The class of transformers for an adapter's kind of task; None is the one with a sequence-classification head."""
    if task_type not in _AUTO:
        return None
    try:
        found = _AUTO[task_type]._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(tuned / ADAPTER_CONFIG, f"task_type is {task_type}, not for {config.model_type}") from error
    return (found[0] if isinstance(found, tuple) else found).__name__


def _task(name: str, problem: str, labels: list[str], task: Task | None) -> dict[str, Any]:
    """What the manifest says of the task: the given one's names for the labels, where the weights have none."""
    if task is None:
        return {"name": name, "problem": problem, "labels": labels, "digest": None}
    wanted = list(task.labels)
    if len(wanted) != len(labels) or (wanted != labels and labels != [f"LABEL_{i}" for i in range(len(labels))]):
        raise InputError(
            "--task", f"{task.name} has labels {wanted}, the weights {labels}: expected the same, in order"
        )
    return {"name": task.name, "problem": task.problem, "labels": wanted, "digest": task.digest}


def _finish(into: Path, base: Base, base_name: str, task: dict[str, Any], about: dict[str, Any]) -> None:
    settings = {"seed": SEED, "max_length": min(MAX_LENGTH, models.positions(base.folder) or MAX_LENGTH)}
    recorded = described(base.folder, base_name, fingerprint(base).as_dict())
    manifest = Manifest(task=task, base=recorded, method="import", metrics={}, history=[], settings=settings, **about)
    write_manifest(into, manifest)
