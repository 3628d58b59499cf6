"""What `apply` and `project` do to outdated differences before they are added: map them, find their strength."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from recyclable import models
from recyclable.analysis import layers, projection, strength
from recyclable.analysis.measure import BATCH, mean_loss
from recyclable.config import RecycleConfig
from recyclable.data.examples import LabelledTexts
from recyclable.data.fewshot import k_shot, limit
from recyclable.data.tasks import Task
from recyclable.errors import InputError
from recyclable.objectives.labelled import LabelledTask
from recyclable.training import distributed
from recyclable.training.evaluation import predict
from recyclable.weights.adapted import AdaptedWeights, require_same_tuning
from recyclable.weights.base import Base
from recyclable.weights.differences import Differences, Scaled
from recyclable.weights.provenance import refuse_early, require_own_base
from recyclable.weights.sources import fill
from recyclable.weights.starts import strength_tensors
from recyclable.weights.store import find
from recyclable.weights.vocabulary import load_tokenizer


@dataclass(frozen=True)
class KnownTask:
    """A task whose weights exist on both bases."""

    old: AdaptedWeights
    new: AdaptedWeights


def known_tasks(config: RecycleConfig, weights: AdaptedWeights, old: Base, new: Base, task: Task) -> list[KnownTask]:
    """The tasks that `project_from` names; InputError where one is of other bases or another tuning, or is two tasks.

    That their files and bases are what the manifests say is seen by reading: `verify_known`.
    """
    known = []
    for place, names in enumerate(config.project_from):
        one = KnownTask(*(AdaptedWeights(find(name, config.store), verify=False) for name in names))
        for each, base in ((one.old, old), (one.new, new)):
            refuse_early(each, base)
            require_same_tuning(each, weights, f" as of {weights.folder}")
        of_old, of_new = ({k: w.manifest.task[k] for k in ("name", "labels")} for w in (one.old, one.new))
        if of_old != of_new:
            raise InputError(f"project_from.{place}", f"found weights of {of_old} and of {of_new}, expected one task's")
        if of_old["name"] == task.name and distributed.is_main():
            print(f"notice: {one.new.folder} is for {task.name} itself: the projection has seen the answer", flush=True)
        known.append(one)
    return known


def verify_known(known: Iterable[KnownTask], old: Base, new: Base) -> None:
    """After the reading: InputError where files or bases are not those that the manifests say; a collective."""
    for one in known:
        for each, base in ((one.old, old), (one.new, new)):
            for file in each.files():
                file.complete(team=distributed.Ranks())
            each.verify()
            require_own_base(each, base)


def projected(
    known: list[KnownTask],
    model: nn.Module,
    weights: AdaptedWeights,
    differences: Differences,
    old: Base,
    new: Base,
    config: RecycleConfig,
) -> tuple[Differences, dict[float, float]]:
    """Outdated differences mapped as those of the known tasks were, and `projection.learn`'s errors by ridge.

    The head stays as it is. A collective.
    """
    head = models.adapter_head(model, weights, new) if weights.is_adapter else set()
    shapes = {n: differences.shape(n) for n in differences.names if n not in head}
    pairs = []
    for one in known:
        pair = models.differences_on(new, one.old, old), models.differences_on(new, one.new, new)
        for each, theirs in zip((one.old, one.new), pair, strict=True):
            found = {n: theirs.shape(n) for n in theirs.names if n in shapes}
            for name, wanted in shapes.items():
                if found.get(name) != wanted:
                    problem = f"{name} is {found.get(name, 'missing')}, in {weights.folder} {wanted}"
                    raise InputError(each.folder, problem)
        pairs.append(pair)
    learned, errors = projection.learn(
        pairs,
        list(shapes),
        new.config.hidden_size,
        rank=config.project_rank,
        network=config.project_with == "network",
        seed=config.seed,
        team=distributed.Ranks(),
    )
    return projection.Projected(differences, learned, new.config.hidden_size), errors


def _projection_record(known: list[KnownTask], errors: dict[float, float], config: RecycleConfig) -> dict[str, Any]:
    """What the manifest says of a projection."""
    pairs = []
    for one in known:
        told = {"task": one.new.manifest.task["name"]}
        for when, each in (("old", one.old), ("new", one.new)):
            told[when] = {"weights": str(each.folder), "files": each.manifest.files}
        pairs.append(told)
    told = {"with": config.project_with, "rank": config.project_rank, "learned_from": pairs}
    return {**told, "left_out_error_by_ridge": {str(ridge): error for ridge, error in errors.items()}}


class Trials:
    """A model of the new base, asked for its loss with the outdated differences added at any strength.

    Args:
        objective: holds the model; its weights are read anew for every loss.
    """

    def __init__(
        self,
        objective: LabelledTask,
        weights: AdaptedWeights,
        differences: Differences,
        old: Base,
        new: Base,
    ) -> None:
        self.objective, self.weights, self.differences, self.old, self.new = objective, weights, differences, old, new

    def names(self) -> list[str]:
        """The tensors that a strength multiplies; InputError for a kind of adapter that has none."""
        if self.weights.is_adapter:
            return strength_tensors(self.weights, models.differences_on(self.new, self.weights, self.old))
        return self.differences.names

    def fill(self, differences: Differences) -> None:
        """Give the model its weights."""
        models.load_differences(self.objective.student, self.weights, differences, self.old, self.new)
        fill(self.objective, device=distributed.device()).eval()

    def loss(self, examples: LabelledTexts, scales: Mapping[str, float]) -> float:
        """Mean loss on texts that are shared out to the ranks; a collective."""
        self.fill(Scaled(self.differences, scales))
        return mean_loss(predict(self.objective, examples, BATCH, distributed.device()), examples.labels)

    def strengths(self, examples: LabelledTexts, by_layer: bool) -> tuple[dict[str, float], dict[str, Any]]:
        """The best strength of every tensor that has one, and what the manifest says of the search; a collective.

        Args:
            by_layer: one for each layer group, else one for all.
        """
        groups = layers.by_layer(self.names()) if by_layer else {"all": self.names()}

        def loss(scales: Mapping[str, float]) -> float:
            return self.loss(examples, {name: scale for group, scale in scales.items() for name in groups[group]})

        tried = strength.line_search(lambda scale: loss(dict.fromkeys(groups, scale)))
        found, lowest = dict.fromkeys(groups, strength.best(tried)), tried[strength.best(tried)]
        if by_layer:
            found, lowest = strength.by_group(loss, list(groups), tried)
        record = {
            "strength": found,
            "loss": lowest,
            "loss_by_common_strength": {str(s): tried[s] for s in sorted(tried)},
            "examples": len(examples),
        }
        return {name: scale for group, scale in found.items() for name in groups[group]}, record


def trials_of(
    known: list[KnownTask],
    objective: LabelledTask,
    weights: AdaptedWeights,
    old: Base,
    new: Base,
    config: RecycleConfig,
) -> tuple[Trials, dict[str, Any]]:
    """The outdated weights as the method adds them (mapped, where tasks are known), at full strength in the model.

    A collective. Returns them with what the manifest says of the mapping.
    """
    differences, told = models.differences_on(new, weights, old, config, config.seed), {}
    if config.finds_strength():
        Trials(objective, weights, differences, old, new).names()  # raises now what it would raise after the reading
    if known:
        differences, errors = projected(known, objective.student, weights, differences, old, new, config)
        told = {"projection": _projection_record(known, errors, config)}
    trials = Trials(objective, weights, differences, old, new)
    trials.fill(differences)
    return trials, told


def few_examples(
    task: Task, folder: Path, max_length: int, count: int, seed: int, shots: int | None = None, split: str = "train"
) -> LabelledTexts:
    """At most `count` labelled texts of a split, out of the few-shot sample where there is one."""
    texts = task.splits[split]
    if shots is not None:
        texts, _ = k_shot(texts, shots, seed, task.problem)
    return LabelledTexts(limit(texts, count, seed), load_tokenizer(folder), max_length)


def unseen_split(task: Task) -> str:
    """Where a strength is found: dev, or train where there is none.

    Outdated weights were tuned on the training texts, and the more they are exaggerated the lower the loss is there.
    """
    return "dev" if "dev" in task.splits else "train"
