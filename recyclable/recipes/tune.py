"""`recyclable tune`: base + task -> adapted weights."""

from __future__ import annotations

from typing import Any

from recyclable import models
from recyclable.config import TuneConfig
from recyclable.data.tasks import load_task
from recyclable.objectives.labelled import LabelledTask
from recyclable.recipes.adapting import RESULT, Student, learn, save_learned, task_data
from recyclable.training import distributed, rundir
from recyclable.training.engine import materialize
from recyclable.weights.adapted import read_manifest
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint


def tune(config: TuneConfig, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Tune a base on a labelled task; returns the metrics of the best step on dev and test."""
    folder = models.locate(config.base)
    base, task = Base(folder), load_task(config.task)
    data = task_data(config, task, folder)
    model = models.attach_adapter(models.task_model(base, task, config.seed, config.dropout), config, config.seed)
    objective = LabelledTask(model)
    materialize(objective, config, ds_config)
    base.hashed.complete(team=distributed.Ranks())
    student = Student(model, base, fingerprint(base), config, data, config)
    if not rundir.claim(config, RESULT, resume):
        return read_manifest(config.out).metrics
    outcome = learn(student, objective, ds_config, resume, "tune")
    return save_learned(student, outcome, method="tune")
