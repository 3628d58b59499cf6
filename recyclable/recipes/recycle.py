"""`recyclable recycle`: outdated weights + old base + new base + task -> adapted weights of the new base."""

from __future__ import annotations

from typing import Any

from torch import nn

from recyclable import models
from recyclable.config import RecycleConfig, TuningSettings, make_config
from recyclable.data.tasks import Task, load_task
from recyclable.errors import InputError
from recyclable.objectives.distillation import Distillation
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Objective
from recyclable.recipes.adapting import RESULT, Student, learn, save_applied, save_learned, scores, task_data
from recyclable.training import distributed, rundir
from recyclable.weights.adapted import AdaptedWeights, read_manifest
from recyclable.weights.base import Base
from recyclable.weights.provenance import require_descendant, require_own_base

STARTS_OUTDATED = {"init", "both", "apply"}
LEARNS_FROM_TEACHER = {"distill", "both"}


def recycle(config: RecycleConfig, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Recycle adapted weights for an upgraded base; returns the metrics of the best step on dev and test."""
    folder, old_folder = models.locate(config.base), models.locate(config.old_base)
    new, old, weights = Base(folder), Base(old_folder), AdaptedWeights(config.weights)
    require_own_base(weights, old)
    own, relation = require_descendant(weights, new, config.allow_unrelated)
    task = load_task(config.task)
    require_same_labels(weights, task)
    tuning = make_config(TuningSettings, weights.manifest.tuning, weights.folder)
    data = task_data(config, task, folder)

    if config.method in STARTS_OUTDATED:
        model = outdated_model(weights, old, new, task, config.seed, config.dropout)
    else:
        model = models.attach_adapter(models.task_model(folder, task, config.seed, config.dropout), tuning, config.seed)
    student = Student(model, new, own, tuning, data, config)
    if not rundir.claim(config, RESULT, resume):
        return read_manifest(config.out).metrics

    origin = {
        "base": weights.manifest.base,
        "task": weights.manifest.task["name"],
        "weights": str(weights.folder),
        "files": weights.manifest.files,
        "relation": relation,
    }
    if config.method == "apply":
        device = distributed.device()
        untrained = LabelledTask(model).eval().to(device)
        dev, test = (
            scores(untrained, split, task.problem, config, device) if split else {} for split in (data.dev, data.test)
        )
        return save_applied(student, weights, dev, test, origin)
    objective = _objective(student, weights, old, task, config)
    outcome = learn(student, objective, ds_config, resume, config.method)
    return save_learned(student, outcome, method=config.method, recycled_from=origin)


def outdated_model(
    weights: AdaptedWeights, old: Base, new: Base, task: Task, seed: int, dropout: float | None = None
) -> nn.Module:
    """A model of base `new` with outdated weights on it (`old` is the base they were tuned on)."""
    tuning = make_config(TuningSettings, weights.manifest.tuning, weights.folder)
    model = models.attach_adapter(models.task_model(new.folder, task, seed, dropout), tuning, seed)
    models.load_adapted(model, weights, old, new)
    return model


def require_same_labels(weights: AdaptedWeights, task: Task) -> None:
    """The head of the weights must be a head for this task's labels, in this order."""
    found, wanted = weights.manifest.task["labels"], list(task.labels)
    if found != wanted:
        raise InputError(weights.folder, f"was tuned for labels {found}, the task {task.name} has {wanted}")


def _objective(student: Student, weights: AdaptedWeights, old: Base, task: Task, config: RecycleConfig) -> Objective:
    """Labels alone, or labels and the teacher: the old base with the old weights."""
    if config.method not in LEARNS_FROM_TEACHER:
        return LabelledTask(student.model)
    teacher = outdated_model(weights, old, old, task, config.seed)
    return Distillation(
        student.model,
        teacher,
        alpha=config.alpha,
        beta=config.beta,
        temperature=config.temperature,
        reduction=config.kd_reduction,
    )
