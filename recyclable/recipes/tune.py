"""`recyclable tune`: base + task -> adapted weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recyclable import distributed, machine
from recyclable.models.tasks import task_model
from recyclable.objectives.of_task import task_objective
from recyclable.recipes.adapting import RESULT, Student, learn, save_learned
from recyclable.recipes.tune_settings import TuneSettings
from recyclable.tasks.parts.task import load_task
from recyclable.tasks.parts.task_data import task_data
from recyclable.training import rundir
from recyclable.training.engine import materialize
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import read_lineage
from recyclable.weights.locate import locate
from recyclable.weights.manifest import read_manifest
from recyclable.weights.reader import Reader


def tune(settings: TuneSettings, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Tune a base on a labelled task; returns the metrics of the best step on dev and test."""
    machine.require_logits(settings.logits, ds_config)
    base, task = Base(locate(settings.base)), load_task(settings.task)
    read_lineage(base.folder)  # is handed on: broken, it is refused now
    reader, head = replace(Reader.of(base), prompts=settings.prompts), task.kind.model_class_for(base.config)
    data, fields = task_data(settings, task, reader), reader.fields(head)
    bare = task_model(base, task, settings.seed, settings.dropout, fields)
    model = settings.attach(bare, task.kind.task_type_for(base.config), settings.seed)
    objective = task_objective(model, task.kind, settings.logits)
    materialize(objective, settings, ds_config)
    base.hashed.complete(team=distributed.Ranks())
    student = Student(model, base, fingerprint(base), settings.described(), data, settings, config=fields)
    with rundir.claim(settings, settings.out, RESULT, resume) as unfinished:
        if not unfinished:
            return read_manifest(settings.out).metrics
        outcome = learn(student, objective, data.train, settings, ds_config, resume, "tune")
        return save_learned(student, outcome, method="tune")
