"""`recyclable recycle`: outdated weights + old base + new base + task -> adapted weights of the new base."""

from __future__ import annotations

from typing import Any

from torch import nn

from recyclable import models
from recyclable.config import TRAINING_FREE, RecycleConfig, StartSettings, TuningSettings, make_config
from recyclable.data.tasks import Task, load_task
from recyclable.errors import InputError
from recyclable.objectives.distillation import Distillation
from recyclable.objectives.interpolation import Interpolation, Places
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import OnlineTeacher, Teacher
from recyclable.recipes.adapting import RESULT, Student, learn, save_applied, save_learned, scores, task_data
from recyclable.recipes.teaching import teach
from recyclable.recipes.training_free import (
    Trials,
    few_examples,
    known_tasks,
    trials_of,
    unseen_split,
    verify_known,
)
from recyclable.training import distributed, rundir
from recyclable.training.engine import materialize
from recyclable.weights.adapted import AdaptedWeights, read_manifest, require_same_tuning
from recyclable.weights.base import Base
from recyclable.weights.differences import Scaled
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.provenance import claimed_relation, refuse_early, require_own_base, verified
from recyclable.weights.starts import carried
from recyclable.weights.store import find
from recyclable.weights.vocabulary import align

STARTS_OUTDATED = {"init", "both", *TRAINING_FREE}
LEARNS_FROM_TEACHER = {"distill", "both", "interpolate"}


def recycle(config: RecycleConfig, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Recycle adapted weights for an upgraded base; returns the metrics of the best step on dev and test."""
    folder, old_folder = models.locate(config.base), models.locate(config.old_base)
    new, old, weights = Base(folder), Base(old_folder), AdaptedWeights(find(config.weights, config.store), verify=False)
    refuse_early(weights, old)
    claimed_relation(weights, new, config.allow_unrelated)
    task = load_task(config.task)
    head = _head_fits(config, weights, task)
    second = _second(config, weights)
    if config.method in LEARNS_FROM_TEACHER:
        _require_same_tokens(new, old)
    if config.method == "interpolate":
        _require_same_shapes(new, old)
    if config.teacher_cache is not None and config.teacher_cache.is_file():
        raise InputError("teacher_cache", f"{config.teacher_cache} is a file, expected a directory or none yet")
    tuning = make_config(TuningSettings, weights.manifest.tuning, weights.folder)
    data = task_data(config, task, folder)

    if config.method in STARTS_OUTDATED or (config.method == "interpolate" and config.start != "fresh"):
        model = outdated_model(weights, old, new, task, config.seed, config.dropout, config, head)
        moved = _moved_rows(weights, old, new)
    else:
        moved = {}
        model = models.attach_same(models.task_model(new, task, config.seed, config.dropout), weights, config.seed)
    untrained, objective = LabelledTask(model), None
    known = known_tasks(config, weights, old, new, task) if config.method == "project" else []
    if config.method in TRAINING_FREE:
        trials, mapping = trials_of(known, untrained, weights, old, new, config)
    else:
        if not _from_cache(config):
            objective = _objective(model, weights, old, config, head, second)
        materialize(objective or untrained, config, ds_config)
    own, relation = verified(weights, old, new, config.allow_unrelated, distributed.Ranks())
    verify_known(known, old, new)
    student = Student(model, new, own, tuning, data, config)
    if not rundir.claim(config, RESULT, resume):
        return read_manifest(config.out).metrics

    origin = {
        "base": weights.manifest.base,
        "task": weights.manifest.task["name"],
        "labels": weights.manifest.task["labels"],
        "same_labels": head,
        "weights": str(weights.folder),
        "files": weights.manifest.files,
        "relation": relation,
        **moved,
    }
    if config.method in TRAINING_FREE:
        return _untrained(trials, student, config, {**origin, **mapping})
    if objective is None:
        teacher, student = teach(student, weights, lambda: _teacher(weights, old, config), config, ds_config)
        objective = _distillation(model, teacher, config, head)
    outcome = learn(student, objective, ds_config, resume, config.method)
    return save_learned(student, outcome, method=config.method, recycled_from=origin)


def _untrained(trials: Trials, student: Student, config: RecycleConfig, origin: dict[str, Any]) -> dict[str, Any]:
    """Find the strength where one is wanted, score, save; returns the metrics."""
    data, differences = student.data, trials.differences
    if config.finds_strength():
        length, count = config.max_length, config.strength_examples
        split = unseen_split(data.task)
        few = few_examples(data.task, student.base.folder, length, count, config.seed, config.shots, split)
        scales, origin["strength"] = trials.strengths(few, by_layer=config.scale == "auto")
        differences = Scaled(differences, scales)
        trials.fill(differences)
    dev, test = (
        scores(trials.objective, split, data.task.problem, config, distributed.device()) if split else {}
        for split in (data.dev, data.test)
    )
    return save_applied(student, trials.weights, differences, dev, test, config.method, origin)


def outdated_model(
    weights: AdaptedWeights,
    old: Base,
    new: Base,
    task: Task,
    seed: int,
    dropout: float | None = None,
    changes: StartSettings = models.AS_THEY_ARE,
    head: bool = True,
) -> nn.Module:
    """A model of base `new`, unread, with outdated weights on it (`old` is the base they were tuned on).

    Args:
        changes: what happens to their differences first.
        head: False draws the head for the task's labels from `seed`: the weights' is for others.
    """
    model = models.attach_same(models.task_model(new, task, seed, dropout), weights, seed)
    models.load_adapted(model, weights, old, new, changes, seed, head)
    return model


def _moved_rows(weights: AdaptedWeights, old: Base, new: Base) -> dict[str, Any]:
    """What the manifest says of tokens that came and went between the bases, which is told; empty where none did."""
    rows = None if weights.is_adapter else carried(weights, old, new, tokenizer_digest(new))[1]
    if rows is None or rows.unchanged:
        return {}
    if distributed.is_main():
        print(f"notice: {weights.folder}: {rows}", flush=True)
    return {"vocabulary": rows.as_dict()}


def require_same_labels(weights: AdaptedWeights, task: Task, hint: str = "") -> None:
    """The head of the weights must be a head for this task's labels, in this order."""
    found, wanted = weights.manifest.task["labels"], list(task.labels)
    if found != wanted:
        raise InputError(weights.folder, f"was tuned for labels {found}, the task {task.name} has {wanted}{hint}")


def _head_fits(config: RecycleConfig, weights: AdaptedWeights, task: Task) -> bool:
    """Whether the weights' head is for the task's labels; if not, that must be allowed, and is told."""
    theirs = weights.manifest.task
    if theirs["labels"] == list(task.labels):
        return True
    if config.method in TRAINING_FREE or not config.related_task:
        trained = config.method not in TRAINING_FREE
        hint = "related_task=true recycles all but the head" if trained else f"{config.method} trains no head"
        require_same_labels(weights, task, f"; {hint}")
    if distributed.is_main():
        distilled = ", and only hidden states are distilled" if config.method in LEARNS_FROM_TEACHER else ""
        print(
            f"notice: {weights.folder} is for the labels of {theirs['name']}: {task.name} gets a fresh head{distilled}",
            flush=True,
        )
    return False


def _second(config: RecycleConfig, weights: AdaptedWeights) -> tuple[AdaptedWeights, Base] | None:
    """The second fixed model's weights and their base, which must be of the first one's kind."""
    if config.second_weights is None:
        return None
    second, base = AdaptedWeights(find(config.second_weights, config.store)), Base(models.locate(config.second_base))
    require_own_base(second, base)
    require_same_tuning(second, weights)
    require_same_labels(second, _task_of(weights))
    _require_same_shapes(base, Base(models.locate(config.old_base)))
    return second, base


def _require_same_shapes(base: Base, other: Base) -> None:
    """InputError where no straight path leads from one base's weights to the other's."""
    for name in sorted({*base.names, *other.names}):
        found, wanted = (b.shape(name) if name in b else "missing" for b in (base, other))
        if found != wanted:
            raise InputError(base.folder, f"{name} is {found}, in {other.folder} {wanted}: no path to interpolate on")


def _require_same_tokens(new: Base, old: Base) -> None:
    """InputError where the teacher, the old base, would take the student's tokens for others."""
    if tokenizer_digest(new) != tokenizer_digest(old) and not (rows := align(old, new)).unchanged:
        hint = "a teacher reads the student's tokens; methods init and apply need none"
        raise InputError(new.folder, f"has another vocabulary than {old.folder} ({rows}): {hint}")


def _task_of(weights: AdaptedWeights) -> Task:
    """The task of the weights, without its examples."""
    task = weights.manifest.task
    return Task(task["name"], task["problem"], tuple(task["labels"]), {}, task["digest"])


def _from_cache(config: RecycleConfig) -> bool:
    """Whether the teacher answers before training; on a path to it, it computes in every step."""
    return config.method in ("distill", "both") and config.teacher == "cached"


def _teacher(weights: AdaptedWeights, old: Base, config: RecycleConfig) -> nn.Module:
    """The old base with the old weights, unread."""
    return outdated_model(weights, old, old, _task_of(weights), config.seed)


def _distillation(model: nn.Module, teacher: Teacher, config: RecycleConfig, head: bool) -> Distillation:
    """Labels and the teacher; without its logits where its head is for other labels."""
    return Distillation(
        model,
        teacher,
        alpha=config.alpha,
        beta=config.beta,
        temperature=config.temperature,
        reduction=config.kd_reduction,
        logits=head,
    )


def _objective(
    model: nn.Module,
    weights: AdaptedWeights,
    old: Base,
    config: RecycleConfig,
    head: bool,
    second: tuple[AdaptedWeights, Base] | None,
) -> Objective:
    """Labels alone, or labels and the teacher (the old base with the old weights), or points on the path to it too.

    Args:
        head: whether the teacher's head is for the student's labels.
        second: weights and base of a second fixed model to interpolate with.
    """
    if config.method not in LEARNS_FROM_TEACHER:
        return LabelledTask(model)
    teacher = _teacher(weights, old, config)
    if config.method != "interpolate":
        return _distillation(model, OnlineTeacher(teacher, config.teacher_top_k), config, head)
    places = Places(config.points(), config.interpolation_draws or 0, config.interpolation_margin, config.seed)
    return Interpolation(
        model,
        teacher,
        places=places,
        share=config.task_share,
        alphas=config.alpha_by_point or [config.alpha] * (len(places) + 1),
        betas=config.beta_by_point or [config.beta] * (len(places) + 1),
        second=second and outdated_model(second[0], second[1], second[1], _task_of(weights), config.seed),
        left_out=() if head else models.label_heads(model).values(),
        temperature=config.temperature,
        reduction=config.kd_reduction,
        logits=head,
    )
