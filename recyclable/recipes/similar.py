"""`recyclable store similar`: the weights in a store, ranked by how well they would start a new task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from recyclable import models
from recyclable.analysis.transferability import logme
from recyclable.data.examples import Batch, LabelledTexts
from recyclable.data.metrics import main_metric, score
from recyclable.data.tasks import Problem, Task, load_task
from recyclable.errors import InputError
from recyclable.objectives.labelled import model_inputs
from recyclable.recipes.recycle import outdated_model
from recyclable.recipes.training_free import few_examples
from recyclable.training import distributed
from recyclable.training.evaluation import outputs
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.provenance import claimed_relation, refuse_early, verified
from recyclable.weights.sources import fill
from recyclable.weights.store import Store

BARE = "(the base alone)"
_SEED, _LENGTH, _BATCH = 20, 128, 64


def similar(store: Store, task: str, base: str, examples: int) -> list[dict[str, Any]]:
    """A row per entry, best first: LogME and leave-one-out score of its model's frozen features on a few examples.

    An entry's model is `base` with its weights, outdated or not; a feature is the mean of the last layer's states over
    a text. The base without any weights has a row of its own. Entries that cannot go onto the base come last, with the
    reason. Forward passes only; one model is in memory at a time.
    """
    if examples < 2:
        raise InputError("--examples", f"found {examples}, expected at least 2")
    new, labelled = Base(models.locate(base)), load_task(task)
    length = min(_LENGTH, models.positions(new.folder) or _LENGTH)
    few = few_examples(labelled, new.folder, length, examples, _SEED)
    bare = {"name": BARE, "task": None, "tuning": None}
    rows = [{**bare, **_scores(fill(models.task_model(new, labelled, _SEED, None)), few, labelled.problem)}]
    left = []
    for name in store.names():
        row = {"name": name}
        try:
            weights = AdaptedWeights(store.path(name), verify=False)
            row.update(task=weights.manifest.task["name"], tuning=weights.manifest.tuning["tuning"])
            rows.append({**row, **_scores(_model(weights, new, labelled), few, labelled.problem)})
        except InputError as error:
            left.append({**row, "left_out": str(error)})
    return sorted(rows, key=lambda row: -row["logme"]) + left


def _model(weights: AdaptedWeights, new: Base, task: Task) -> nn.Module:
    """The entry's weights on the base, verified; the head is the task's, and not used."""
    old = new
    if claimed_relation(weights, new) != "own":
        old = Base(models.locate(weights.manifest.base["name"]))
        refuse_early(weights, old)
    model = fill(outdated_model(weights, old, new, task, _SEED, head=False))
    verified(weights, old, new)
    return model


def _scores(model: nn.Module, examples: LabelledTexts, problem: Problem) -> dict[str, float]:
    model = model.eval().to(distributed.device())

    def features(batch: Batch) -> dict[str, torch.Tensor]:
        states_BTD = model(**model_inputs(batch), output_hidden_states=True).hidden_states[-1]
        real_BT = batch["attention_mask"].to(states_BTD.dtype)
        return {"": torch.einsum("btd,bt->bd", states_BTD, real_BT) / real_BT.sum(1, keepdim=True)}

    found = outputs(features, examples, np.arange(len(examples)), _BATCH, distributed.device())[""].cpu().numpy()
    labels = examples.labels.numpy()
    if problem == "classification":
        classes, labels = np.unique(labels, return_inverse=True)
        evidence = logme(found, np.eye(len(classes))[labels])
    else:
        evidence = logme(found, labels[:, None])
    metric = main_metric(problem)
    return {"logme": evidence.logme, metric: score(problem, evidence.left_out, labels)[metric]}
