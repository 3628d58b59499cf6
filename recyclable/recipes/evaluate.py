"""`recyclable evaluate`: adapted weights on a base, scored on a task, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recyclable import models
from recyclable.data.examples import LabelledTexts
from recyclable.data.metrics import score
from recyclable.data.tasks import load_task
from recyclable.errors import InputError
from recyclable.objectives.labelled import LabelledTask
from recyclable.recipes.recycle import outdated_model, require_same_labels
from recyclable.report.compare import compare, plot
from recyclable.training import distributed
from recyclable.training.evaluation import predict
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.provenance import claimed_relation, refuse_early, verified
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer


def evaluate_all(
    folders: list[Path], base: str, task: str, *, old_base: str | None, split: str, png: Path | None = None
) -> list[dict[str, Any]]:
    """A row per directory of adapted weights: how it was made, what that cost, and its scores here.

    Args:
        png: where the dev curves of the runs are drawn, if anywhere.
    """
    opened = [AdaptedWeights(folder, verify=False) for folder in folders]
    manifests = {str(weights.folder): vars(weights.manifest) for weights in opened}
    rows = compare(manifests)
    for row, weights in zip(rows, opened, strict=True):
        del row["test"]  # what the run itself measured; here it is measured anew
        scores = evaluate(weights, base, task, old_base=old_base, split=split)
        row.update(weights=row["method"], method=weights.manifest.method)
        row.update({f"{split}_{name}": value for name, value in scores.items()})
    if png:
        plot({f"dev of {Path(task).name}": {name: [run] for name, run in manifests.items()}}, png)
    return rows


def evaluate(
    weights: AdaptedWeights, base: str, task: str, *, old_base: str | None, split: str, batch_size: int = 64
) -> dict[str, float]:
    """Scores of adapted weights on `base`: their own base, or a recorded descendant they are applied to unchanged.

    Args:
        old_base: the base the weights belong to, where the manifest's name for it does not lead there any more.
    """
    new, labelled = Base(models.locate(base)), load_task(task)
    relation = claimed_relation(weights, new)
    require_same_labels(weights, labelled)
    if split not in labelled.splits:
        raise InputError(task, f"has no {split} split, found {sorted(labelled.splits)}")
    old = new
    if relation != "own":
        old = Base(models.locate(old_base or weights.manifest.base["name"]))
        refuse_early(weights, old)
    settings = weights.manifest.settings
    tokenizer = load_tokenizer(new.folder)
    models.require_length(new.folder, settings["max_length"])
    examples = LabelledTexts(labelled.splits[split], tokenizer, settings["max_length"])
    device = distributed.device()
    model = fill(LabelledTask(outdated_model(weights, old, new, labelled, settings["seed"]))).eval().to(device)
    verified(weights, old, new)
    return score(labelled.problem, predict(model, examples, batch_size, device), examples.labels.numpy())
