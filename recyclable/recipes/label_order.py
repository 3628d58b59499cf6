"""In which order the rows of a head without names stand, by what it says of labelled texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.errors import InputError
from recyclable.models.tasks import read_outdated
from recyclable.objectives.of_task import task_objective
from recyclable.tasks.parts.task import Task
from recyclable.tasks.parts.task_data import few_examples
from recyclable.training.evaluation import predict
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base

_EXAMPLES, _BATCH = 200, 32


def require_order(weights: Path, base: Base, task: Task, tuned: Path) -> None:
    """InputError unless a head without names can be taken to have its rows in the order of the task's labels.

    Nobody tells that order. Names may be numbered as they are sorted, or as the training texts have them one after the
    other: these two must come to the same, and no other order may fit what the head says of training texts better than
    chance would have it. The error names the order that fits best.

    Args:
        weights: where the adapted weights lie, their labels named in the task's order.
        tuned: what they came from, for messages.
    """
    problem = (
        f"is missing: {tuned} does not name its labels, and {task.name} does not say in which order "
        f"{list(task.labels)} stand; name them in the order of the head's rows, here or as `labels` of the task file"
    )
    if not task.kind.exclusive:
        raise InputError("--labels", problem)
    opened = AdaptedWeights(weights)
    settings, kind = opened.manifest.settings, task.kind
    carried = Carried(opened, base, base)
    examples = few_examples(task, carried.reader, settings["max_length"], _EXAMPLES, settings["seed"])
    device = distributed.device()
    model = task_objective(read_outdated(carried, task, settings["seed"]), kind).eval().to(device)
    targets = examples.labels.numpy()
    asked = kind.asked(targets)
    rows = predict(model, examples, _BATCH, device)[asked].argmax(-1)
    said = np.zeros((len(task.labels), len(task.labels)), np.int64)
    np.add.at(said, (rows, targets[asked]), 1)  # [row of the head, label]
    _, best = linear_sum_assignment(said, maximize=True)
    right, most = said.trace(), said[np.arange(len(best)), best].sum()
    fits = most - right > 2 * len(rows) ** 0.5
    if fits:
        problem += f"; what it says of {len(rows)} training texts fits {','.join(task.labels[i] for i in best)}"
    if fits or not task.alike:
        raise InputError("--labels", problem)
