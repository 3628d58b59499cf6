"""`recyclable store similar`: the weights in a store, ranked by how well they would start a new task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from recyclable import distributed
from recyclable.analysis.measure import measure
from recyclable.analysis.transferability import logme
from recyclable.carrying.carried import Carried
from recyclable.carrying.labels import same_labels
from recyclable.carrying.templates import told_template
from recyclable.data.examples import Batch, TaskExamples, model_inputs
from recyclable.errors import InputError
from recyclable.models.tasks import read_outdated, task_model
from recyclable.recipes.store_list import tuning
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import few_examples
from recyclable.training.evaluation import outputs
from recyclable.weights.base import Base
from recyclable.weights.locate import locate
from recyclable.weights.manifest import read_manifest
from recyclable.weights.reader import Reader
from recyclable.weights.sources import fill
from recyclable.weights.store import Store

BARE = "(the base alone)"
_SEED, _LENGTH, _BATCH = 20, 128, 64


def similar(store: Store, task: str, base: str, examples: int) -> list[dict[str, Any]]:
    """A row per entry, best first: LogME and leave-one-out score of its model's frozen features on a few examples.

    An entry's model is `base` with its weights, outdated or not; a feature is the mean of the last layer's states over
    a text. Where answers are text it is how well it does on them as it is. The base without any weights has a row of
    its own. Entries that cannot go onto the base come last, with the
    reason. Forward passes only; one model is in memory at a time.
    """
    if examples < 2:
        raise InputError("--examples", f"found {examples}, expected at least 2")
    new, labelled = Base(locate(base)), load_task(task)

    def few(reader: Reader) -> TaskExamples:
        length = min(_LENGTH, reader.limit or _LENGTH)
        return few_examples(labelled, reader, length, examples, _SEED)

    fields = Reader.of(new).fields(labelled.kind.model_class_for(new.config))
    bare = {"name": BARE, "task": None, "tuning": None}
    rows: list[dict[str, Any]] = [
        {**bare, **_scores(fill(task_model(new, labelled, _SEED, fields=fields)), few(Reader.of(new)), labelled)}
    ]
    left = []
    for name in store.names():
        row: dict[str, Any] = {"name": name}
        try:
            manifest = read_manifest(store.path(name))
            row.update(task=manifest.task["name"], tuning=tuning(store.path(name), manifest))
            carried = Carried.open(store.path(name), None, new)
            told_template(carried)
            # a head for labels is the task's, and not used; no name holds the model beside the next one's
            head = labelled.kind.over_vocabulary and same_labels(carried.weights, labelled)
            model = read_outdated(carried, labelled, _SEED, head=head)
            rows.append({**row, **_scores(model, few(carried.reader), labelled)})
            del model
        except InputError as error:
            left.append({**row, "left_out": str(error)})
    by = labelled.kind.metrics(labelled.labels)[0] if labelled.kind.over_vocabulary else "logme"
    return sorted(rows, key=lambda row: -row[by]) + left


def _scores(model: nn.Module, examples: TaskExamples, task: Task) -> dict[str, float]:
    model, kind = model.eval().to(distributed.device()), task.kind
    metric = kind.metrics(task.labels)[0]
    if kind.over_vocabulary:  # no head stands between the model and the task
        return {metric: measure(model, examples, task)[metric]}

    def features(batch: Batch) -> dict[str, torch.Tensor]:
        told = model(**model_inputs(batch), output_hidden_states=True)
        states = told.decoder_hidden_states if "decoder_hidden_states" in told else told.hidden_states
        return {"": kind.features(states[-1], batch)}

    found = outputs(features, examples, np.arange(len(examples)), _BATCH, distributed.device())[""].cpu().numpy()
    targets = examples.labels.numpy()
    asked, classes = kind.asked(targets), max(1, len(task.labels))
    evidence = logme(found[asked], kind.encoded(targets[asked]))
    predictions = np.zeros((*asked.shape, classes))
    predictions[asked] = kind.decoded(evidence.left_out, targets[asked], classes)
    return {"logme": evidence.logme, metric: kind.score(predictions, targets, task.labels)[metric]}
