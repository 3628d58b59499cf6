"""`recyclable recycle`: outdated weights + old base + new base + task -> adapted weights of the new base."""

from __future__ import annotations

from typing import Any, TypeVar

from recyclable import distributed, machine
from recyclable.carrying.carried import Carried
from recyclable.carrying.labels import in_order, same_labels
from recyclable.carrying.templates import told_template
from recyclable.carrying.trials import Trials
from recyclable.carrying.writing import write_adapter, write_delta_and_head
from recyclable.errors import InputError
from recyclable.methods.parts.learning import Distils, LearnsFromLabels
from recyclable.methods.parts.method import Method
from recyclable.methods.parts.scene import Scene
from recyclable.methods.parts.untrained import TrainsNothing
from recyclable.models.adapters import require_trains
from recyclable.models.tasks import carried_fields, fresh_model
from recyclable.recipes.adapting import RESULT, Student, finish, learn, save_learned
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import few_examples, task_data, unseen_split
from recyclable.training import rundir
from recyclable.training.engine import materialize
from recyclable.weights.manifest import read_manifest

M = TypeVar("M", bound=Method)


def recycle(method: Method, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Recycle adapted weights for an upgraded base; returns the metrics of the best step on dev and test."""
    if not isinstance(method, LearnsFromLabels | TrainsNothing):
        problem = "derives neither from LearnsFromLabels nor from TrainsNothing, expected one of them"
        raise InputError("method", f"{method.method} {problem}")
    if isinstance(method, LearnsFromLabels):
        machine.require_logits(method.logits, ds_config)
    carried = Carried.open(
        method.weights, method.old_base, method.base, store=method.store, allow_unrelated=method.allow_unrelated
    )
    method = _cut_as_tuned(method, carried)
    task = load_task(method.task)
    if head := _head_fits(method, carried, task):
        task = in_order(carried.weights, task)
    scene = Scene(carried, task_data(method, task, carried.reader), head, ds_config)
    method.require(scene)
    if isinstance(method, LearnsFromLabels):
        return _learned(method, scene, resume)
    return _applied(method, scene, resume)


def _cut_as_tuned(method: M, carried: Carried) -> M:
    """The method with the length that the outdated weights were tuned at, where none is given."""
    theirs = carried.weights.manifest.settings["max_length"]
    if method.max_length is None:
        return method.model_copy(update={"max_length": theirs})
    if method.max_length != theirs:
        place = carried.weights.folder
        distributed.say(f"notice: texts are cut at {method.max_length} tokens; {place} was tuned at {theirs}")
    return method


def _learned(method: LearnsFromLabels, scene: Scene, resume: bool) -> dict[str, Any]:
    """Start where the method starts, train on what it learns from."""
    model = method.student(scene)
    require_trains(model, scene.carried.weights.folder)
    told, objective = method.told(scene), method.objective(model, scene)
    materialize(objective, method, scene.ds_config)
    student, origin = _verified(method, scene, model)
    with rundir.claim(method, method.out, RESULT, resume) as unfinished:
        if not unfinished:
            return read_manifest(method.out).metrics
        examples = method.examples(scene)
        outcome = learn(student, objective, examples, method, scene.ds_config, resume, method.method)
        return save_learned(student, outcome, method=method.method, recycled_from={**origin, **told})


def _applied(method: TrainsNothing, scene: Scene, resume: bool) -> dict[str, Any]:
    """Put the differences on the new base, at a strength that is found where one is wanted; score and save them."""
    carried, data, ds_config = scene.carried, scene.data, scene.ds_config
    model = fresh_model(carried, scene.task, method.seed)
    told = method.told(scene)
    differences, how = method.mapped(model, scene)
    trials, strength = Trials(model, scene.task, carried, differences), method.strength()
    if strength != "none":
        _ = trials.strength.names  # raises now what it would raise after the reading
    trials.materialize(ds_config)
    student, origin = _verified(method, scene, model)
    method.verify(scene)
    with rundir.claim(method, method.out, RESULT, resume) as unfinished:
        if not unfinished:
            return read_manifest(method.out).metrics
        with trials.asked(ds_config):
            if strength != "none":
                length, count, split = method.max_length, method.strength_examples, unseen_split(scene.task)
                few = few_examples(scene.task, carried.reader, length, count, method.seed, method.shots, split)
                scales, how["strength"] = trials.strengths(few, by_layer=strength == "by_layer")
                differences = trials.strength.at(scales)
            dev, test = trials.scores([data.dev, data.test], differences, method.eval_batch_size)
        team = distributed.Ranks()
        if carried.weights.is_adapter:
            write_adapter(carried, differences, method.out, method.base, team)
        else:
            write_delta_and_head(carried, differences, method.out, team)
        row = {"step": 0, "examples": 0, "seconds": 0.0, **dev}
        return finish(student, [row], row, test, method.method, {**origin, **told, **how})


def _verified(method: Method, scene: Scene, model: Any) -> tuple[Student, dict[str, Any]]:
    """After the reading: the student, and what its manifest says of where it came from; a collective."""
    carried, weights = scene.carried, scene.carried.weights
    own, relation = carried.verify(distributed.Ranks())
    origin = {
        "base": weights.manifest.base,
        "task": weights.manifest.task["name"],
        "labels": weights.manifest.task["labels"],
        "same_labels": scene.head,
        "weights": str(weights.folder),
        "files": weights.manifest.files,
        "relation": relation,
        **told_template(carried),
    }
    fields = carried_fields(carried, scene.task)
    return Student(model, carried.new, own, weights.manifest.tuning, scene.data, method, fields, weights), origin


def _head_fits(method: Method, carried: Carried, task: Task) -> bool:
    """Whether the weights' head is for the task's labels; if not, that must be allowed, and is told."""
    weights = carried.weights
    if same_labels(weights, task):
        return True
    trains = isinstance(method, LearnsFromLabels)
    if not (isinstance(method, LearnsFromLabels) and method.related_task):
        trained = "related_task=true recycles all but the head"
        in_order(weights, task, f"; {trained if trains else f'{method.method} trains no head'}")
    distilled = ", and only hidden states are distilled" if isinstance(method, Distils) else ""
    theirs = weights.manifest.task["name"]
    distributed.say(f"notice: {weights.folder} is for the labels of {theirs}: {task.name} gets a fresh head{distilled}")
    return False
