"""`recyclable evaluate`: adapted weights on a base, scored on a task, beside each other."""

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
from recyclable.models.tasks import outdated_model
from recyclable.objectives.of_task import task_objective
from recyclable.recipes.text_loss import losses
from recyclable.report.compare import compare
from recyclable.tasks.parts.kind import Scores
from recyclable.tasks.parts.task import load_task
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

    Args:
        corpus: texts whose loss per token is told as well, in sequences of `corpus_length` tokens (`text_loss.losses`).
    """
    if texts := {name: CorpusSettings(train=name) for name in corpus}:
        Reader.of(Base(locate(base))).require_length(corpus_length, "corpus_length")
    manifests = {str(folder): vars(read_manifest(folder)) for folder in folders}
    rows = compare(manifests)
    for row, (folder, manifest) in zip(rows, manifests.items(), strict=True):
        del row["test"]  # what the run itself measured; here it is measured anew
        scores = evaluate(folder, base, task, old_base=old_base, split=split, ds_config=ds_config)
        row.update(weights=row["method"], method=manifest["method"])
        row.update({f"{split}_{name}": value for name, value in scores.items()})
        if texts:
            told = losses(texts, base, weights=folder, old_base=old_base, max_length=corpus_length, ds_config=ds_config)
            row.update({f"loss of {name}": loss for name, loss in told.items()})
    return rows


def evaluate(
    weights: str | Path,
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
        ds_config: the machine; by default the model is whole on each rank, in fp32.
        old_base: the base the weights belong to, where the names that are recorded do not lead there any more.
    """
    carried = Carried.open(weights, old_base, base)
    told_template(carried)
    labelled, settings = in_order(carried.weights, load_task(task)), carried.weights.manifest.settings
    if split not in labelled.splits:
        raise InputError(task, f"has no {split} split, found {sorted(labelled.splits)}")
    examples = tokenised(labelled, labelled.splits[split], carried.reader, settings["max_length"], split)
    model = task_objective(outdated_model(carried, labelled, settings["seed"]), labelled.kind)
    with frozen(model, dict(ds_config)) as (answers, device):
        carried.verify(distributed.Ranks())
        return labelled.kind.scores(Asked(answers, batch_size, device), examples, labelled.labels)
