"""A base with the head of a task, fresh or with outdated weights on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from recyclable.adapters.configs import NOTHING
from recyclable.architectures.fields import HEAD_FIELDS, with_fields
from recyclable.carrying.carried import Carried
from recyclable.carrying.labels import same_labels
from recyclable.carrying.putting import differences_of, put
from recyclable.errors import InputError
from recyclable.models.adapters import attach_same
from recyclable.models.build import auto_class, draw, structure, unread
from recyclable.models.language import require_generates
from recyclable.tasks import KINDS
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task import Task
from recyclable.weights.base import Base, read_config
from recyclable.weights.sources import fill


def task_model(
    base: Base, task: Task, seed: int, dropout: float | None = None, fields: Mapping[str, Any] = NOTHING
) -> PreTrainedModel:
    """A base with the head that the kind of task wants, unread, the head drawn from `seed`.

    Args:
        fields: values that take the place of the base's in its config (`architectures.fields.with_fields`).
    """
    if task.kind.over_vocabulary:
        require_generates(base)
    config = _config(base.folder, task.kind, task.labels, fields)
    model, missing, other_shape = unread(auto_class(task.kind.model_class_for(config)), base, config, dropout)
    if task.kind.over_vocabulary and (lacking := [*missing, *other_shape]):
        problem = f"lacks {', '.join(lacking)}, the language-model head that {task.problem} needs"
        raise InputError(base.folder, f"{problem}: expected a base that has one (pretrain makes it)")
    draw(model, [*missing, *other_shape], seed)
    return model


def fresh_model(carried: Carried, task: Task, seed: int, dropout: float | None = None) -> nn.Module:
    """The new base for the task, unread, with a fresh adapter of the kind that the outdated weights are, if any.

    It computes as the outdated weights' model did, where that was otherwise than its base.
    """
    model = task_model(carried.new, task, seed, dropout, carried_fields(carried, task))
    return attach_same(model, carried.weights, seed, carried.moved_indices())


def carried_fields(carried: Carried, task: Task | None = None) -> dict[str, Any]:
    """The fields of a config by which weights' model on the new base computes, or reads, otherwise than its base.

    Args:
        task: another task than the weights' own, whose head it has.
    """
    manifest = carried.weights.manifest
    fields, kind = dict(carried.fields), known_kind(manifest.task) if task is None else task.kind
    if task is not None and not same_labels(carried.weights, task):  # the other task's head has its own
        fields = {name: value for name, value in fields.items() if name not in HEAD_FIELDS}
    reader = carried.reader
    for name, value in (reader.fields(kind.model_class_for(reader.config)) if kind is not None else {}).items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    return fields


def outdated_model(
    carried: Carried,
    task: Task,
    seed: int,
    dropout: float | None = None,
    head: bool = True,
) -> nn.Module:
    """The new base for the task, unread, with the outdated weights on it.

    Args:
        head: False draws the head for the task's labels from `seed`: the weights' is for others.
    """
    model = fresh_model(carried, task, seed, dropout)
    put(model, carried, differences_of(carried), head)
    return model


def read_outdated(carried: Carried, task: Task, seed: int, head: bool = True) -> nn.Module:
    """`outdated_model`, read whole into this process in fp32 and verified, in evaluation mode."""
    model = fill(outdated_model(carried, task, seed, head=head))
    carried.verify()
    return model.eval()


def known_kind(described: dict[str, Any]) -> TaskKind | None:
    """The kind of task that a manifest tells of; None where it is not known here."""
    return KINDS.get(described["problem"])() if described["problem"] in KINDS.names() else None


def task_structure(
    folder: Path, described: dict[str, Any], architecture: str | None, fields: Mapping[str, Any]
) -> PreTrainedModel:
    """The structure of a model tuned on a base for a task, as `structure`; its config is the base's with the labels.

    Args:
        fields: as for `task_model`.
        described: what a manifest says of the task, whose kind need not be known here where `architecture` is.
    """
    kind = known_kind(described) or KINDS.get(described["problem"] if architecture is None else "classification")()
    config = _config(folder, kind, described["labels"], fields)
    return structure(config, auto_class(kind.model_class_for(config)), architecture)


def _config(folder: Path, kind: TaskKind, labels: Sequence[str], fields: Mapping[str, Any]) -> PretrainedConfig:
    config: PretrainedConfig = read_config(folder)
    kind.set_labels(config, labels)
    return with_fields(config, fields)
