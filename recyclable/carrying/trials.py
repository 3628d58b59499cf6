"""A model of the new base with outdated differences on it at any strength, asked for its loss; whole on no rank.

The model is partitioned over the ranks under ZeRO-3 like any other, and its weights are read anew into the partitions
for every strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from recyclable.analysis import strength
from recyclable.analysis.measure import BATCH
from recyclable.carrying.carried import Carried
from recyclable.carrying.putting import Placement
from recyclable.carrying.scaling import Strength
from recyclable.data.examples import TaskExamples
from recyclable.objectives.of_task import task_objective
from recyclable.tasks.parts.kind import Scores
from recyclable.tasks.parts.task import Task
from recyclable.training import zero
from recyclable.training.asking import Asked
from recyclable.training.engine import frozen, in_fp32, to_ask
from recyclable.training.evaluation import predict
from recyclable.weights.differences import Differences


class Trials:
    """Outdated differences about to be tried, untrained.

    Args:
        model: of the new base, unread; its weights come from the differences.
        differences: made from those of the weights; what a strength multiplies.
    """

    def __init__(self, model: nn.Module, task: Task, carried: Carried, differences: Differences) -> None:
        self.task, self.carried, self.differences = task, carried, differences
        self.strength = Strength(carried, differences)
        self.objective = task_objective(model, task.kind)
        self._answers: Callable[..., Any]
        self._device: torch.device | str
        self._placement = Placement(model, carried, differences)
        self._placement.put(differences)

    def materialize(self, ds_config: dict[str, Any]) -> None:
        """Read what is unread, in fp32, to where `ds_config` wants it; a collective."""
        zero.materialize(self.objective, to_ask(in_fp32(ds_config)))

    @contextmanager
    def asked(self, ds_config: dict[str, Any]) -> Iterator[None]:
        """While it lasts, strengths can be searched for and examples scored; a collective.

        Once is all: ZeRO leaves a model that it has partitioned unusable for a second engine.
        """
        with frozen(self.objective, in_fp32(ds_config)) as (self._answers, self._device):
            yield

    def strengths(self, examples: TaskExamples, by_layer: bool) -> tuple[dict[str, float], dict[str, Any]]:
        """The best strength of every tensor that has one, and what the manifest says of the search; a collective.

        Args:
            by_layer: one for each layer group, else one for all.
        """
        names = self.strength.names
        groups = self.carried.new.structure.layers.split(names) if by_layer else {"all": names}

        def loss(scales: Mapping[str, float]) -> float:
            found = {name: scale for group, scale in scales.items() for name in groups[group]}
            self._read(self.strength.at(found))
            predicted = predict(self._answers, examples, BATCH, self._device)
            return self.task.kind.mean_loss(predicted, examples.labels.numpy())

        tried = strength.line_search(lambda scale: loss(dict.fromkeys(groups, scale)))
        found, lowest = dict.fromkeys(groups, strength.best(tried)), tried[strength.best(tried)]
        if by_layer:
            found, lowest = strength.by_group(loss, list(groups), tried)
        record = {
            "strength": found,
            "loss": _told(lowest),
            "loss_by_common_strength": {str(s): _told(tried[s]) for s in sorted(tried)},
            "examples": len(examples),
        }
        return {name: scale for group, scale in found.items() for name in groups[group]}, record

    def scores(self, splits: Sequence[TaskExamples | None], differences: Differences, batch_size: int) -> list[Scores]:
        """Scores on each split (none for None) with these differences; a collective."""
        if differences is not self.differences:
            self._read(differences)
        kind, labels = self.task.kind, self.task.labels

        def of(split: TaskExamples) -> Scores:
            return kind.scores(Asked(self._answers, batch_size, self._device), split, labels)

        return [of(split) if split is not None else {} for split in splits]

    def _read(self, differences: Differences) -> None:
        """Give the model its weights anew."""
        zero.overwrite(self._placement.reads(differences))


def _told(loss: float) -> float | None:
    """As JSON has it, where a strength was far too large."""
    return loss if math.isfinite(loss) else None
