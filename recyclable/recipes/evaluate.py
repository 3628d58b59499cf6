"""`recyclable evaluate`: adapted weights on a base, or a base alone, scored on a task, beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.carrying.labels import in_order
from recyclable.carrying.templates import told_template
from recyclable.config.settings import CorpusSettings
from recyclable.errors import InputError
from recyclable.models.generating import generating_model
from recyclable.models.tasks import outdated_model
from recyclable.objectives.of_task import task_objective
from recyclable.recipes.text_loss import losses
from recyclable.report.compare import compare
from recyclable.tasks.parts.kind import Scores
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import tokenised
from recyclable.training.asking import Asked
from recyclable.training.engine import frozen
from recyclable.weights.base import Base
from recyclable.weights.locate import locate
from recyclable.weights.manifest import read_manifest
from recyclable.weights.reader import Reader

IN_FP32: Mapping[str, Any] = MappingProxyType({})


def evaluate_all(
    folders: list[Path],
    base: str,
    task: str,
    *,
    old_base: str | None,
    split: str,
    ds_config: Mapping[str, Any] = IN_FP32,
    corpus: Sequence[str] = (),
    corpus_length: int = 128,
) -> list[dict[str, Any]]:
    """A row per directory of adapted weights: how it was made, what that cost, and its scores here; a collective.

    Without any the one row is the base's alone, for a task whose answers are text.

    Args:
        corpus: texts whose loss per token is told as well, in sequences of `corpus_length` tokens (`text_loss.losses`).
    """
    texts = {name: CorpusSettings(train=name) for name in corpus}
    if texts:
        Reader.of(Base(locate(base))).require_length(corpus_length, "corpus_length")
    runs: dict[str, dict[str, Any]] = {str(folder): vars(read_manifest(folder)) for folder in folders}
    asked: list[str | None] = [*runs] or [None]
    runs = runs or {base: {"method": "base", "metrics": {}, "history": []}}
    given: dict[str, Any] = {"old_base": old_base, "ds_config": ds_config}
    told = [  # first: it refuses what no text is asked of
        losses(texts, base, weights=weights, max_length=corpus_length, **given) if texts else {} for weights in asked
    ]
    rows = compare(runs)
    for row, run, weights, of_texts in zip(rows, runs.values(), asked, told, strict=True):
        del row["test"]  # what the run itself measured; here it is measured anew
        scores = evaluate(weights, base, task, split=split, **given)
        row.update(weights=row["method"], method=run["method"])
        row.update({f"{split}_{name}": value for name, value in scores.items()})
        row.update({f"loss of {name}": loss for name, loss in of_texts.items()})
    return rows


def evaluate(
    weights: str | Path | None,
    base: str,
    task: str,
    *,
    old_base: str | None = None,
    split: str = "test",
    batch_size: int = 64,
    ds_config: Mapping[str, Any] = IN_FP32,
) -> Scores:
    """Scores of adapted weights on `base`: their own base, or a recorded descendant they are applied to unchanged.

    A collective: the ranks share the examples. Under ZeRO-3 none of them holds the whole model.

    Args:
        weights: None: the base alone, as the language model that it is.
        ds_config: the machine; by default the model is whole on each rank, in fp32.
        old_base: the base the weights belong to, where the names that are recorded do not lead there any more.
    """
    if weights is None:
        opened, labelled, carried, max_length = Base(locate(base)), load_task(task), None, None
        _require_text_answers(labelled, opened)
        reader = Reader.of(opened)
    else:
        carried = Carried.open(weights, old_base, base)
        told_template(carried)
        labelled, settings = in_order(carried.weights, load_task(task)), carried.weights.manifest.settings
        reader, max_length = carried.reader, settings["max_length"]
    if split not in labelled.splits:
        raise InputError(task, f"has no {split} split, found {sorted(labelled.splits)}")
    examples = tokenised(labelled, labelled.splits[split], reader, max_length, split)
    model = generating_model(opened) if carried is None else outdated_model(carried, labelled, settings["seed"])
    with frozen(task_objective(model, labelled.kind), dict(ds_config)) as (answers, device):
        if carried is not None:
            carried.verify(distributed.Ranks())
        return labelled.kind.scores(Asked(answers, batch_size, device), examples, labelled.labels)


def _require_text_answers(task: Task, base: Base) -> None:
    """InputError for a task that needs a head of its own, which a base alone has not."""
    if not task.kind.over_vocabulary:
        problem = f"none given, but {task.name} is for {task.problem}, for which {base.folder} has no head"
        raise InputError("weights", f"{problem}: expected weights that were tuned for it")
