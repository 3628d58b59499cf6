"""What forward passes say of outdated weights: their score on both bases, and along the path between the two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from recyclable import models
from recyclable.analysis.connectivity import barrier, connectivity, path_points, shapes
from recyclable.analysis.measure import loss_and_scores, measure
from recyclable.analysis.points import measured
from recyclable.analysis.similarity import compare
from recyclable.analysis.verdict import Features, standard_error
from recyclable.data.examples import LabelledTexts
from recyclable.data.fewshot import limit
from recyclable.data.metrics import main_metric
from recyclable.data.tasks import Split, Task, load_task
from recyclable.errors import InputError
from recyclable.recipes.recycle import outdated_model, require_same_labels
from recyclable.recipes.similarity import backbone, batches
from recyclable.training import distributed
from recyclable.weights.adapted import AdaptedWeights, require_same_tuning
from recyclable.weights.base import Base
from recyclable.weights.digest import sha256_json
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.provenance import claimed_relation, verified
from recyclable.weights.sources import fill
from recyclable.weights.store import find
from recyclable.weights.team import Team
from recyclable.weights.vocabulary import load_tokenizer

if TYPE_CHECKING:
    from recyclable.recipes.probe import ProbeConfig

SPLIT = "dev"


@dataclass(frozen=True)
class Trial:
    """Outdated weights about to be tried on a task, everything checked."""

    weights: AdaptedWeights
    old: Base
    new: Base
    task: Task
    split: Split
    points: int
    to: AdaptedWeights | None
    """Weights tuned on the new base, where the path is to lead to them."""
    own: bool

    def run(self, evidence: dict[str, Any], out: Path | None, team: Team) -> Features:
        """Add what is found to `evidence`; a collective. Finished points are kept in `out`."""
        if self.to is not None:
            verified(self.to, self.new, self.new, team=team)
        scores = compatibility(self.weights, [self.old, self.new], self.task, self.split, out, team)
        metric, floor = main_metric(self.task.problem), knowing_nothing(self.task, self.split)
        told = {"metric": metric, "examples": len(self.split), "old": scores[0], "new": scores[1], "majority": floor}
        if self.task.labels:
            told["chance"] = 1 / len(self.task.labels)
        evidence["compatibility"] = told
        paths = self._paths()
        for name, ends in paths.items():
            path = self._along(ends, metric, out and out / f"{name}.json", team)
            if name == "path":
                evidence["connectivity"] = path
            else:
                evidence["connectivity"][name] = path
        if (similarity := self._similarity(team)) is not None:
            evidence["similarity"] = similarity
        errors = {
            f"{when}_error": standard_error(metric, scores[i][metric], len(self.split))
            for i, when in enumerate(("old", "new"))
        }
        values = {"old": scores[0][metric], "new": scores[1][metric], "floor": floor[metric]}
        return Features(self.own, **values, **errors)

    def _paths(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The ends of each path there is: from the old model to the new one; an adapter's alone, on the new base.

        Bases with other shapes or tokenizers have no straight path between them.
        """
        first, applied = (self._model(self.weights, base) for base in (self.old, self.new))
        last = applied if self.to is None else self._model(self.to, self.new, own=True)
        if self.own and self.to is None:
            return {}
        if shapes(first) != shapes(last) or tokenizer_digest(self.old) != tokenizer_digest(self.new):
            return {}
        alone = {"adapter_alone": (applied, last)} if self.weights.is_adapter and last is not applied else {}
        return {"path": (first, last), **alone}

    def _similarity(self, team: Team) -> dict[str, Any] | None:
        """How alike the two bases work on the dev examples, before any tuning; two models are in memory for it.

        None on their own base, for other tokenizers, and for models whose heads or neurons cannot be compared.
        """
        if self.own or tokenizer_digest(self.old) != tokenizer_digest(self.new):
            return None
        backbones = [backbone(base, self.task) for base in (self.old, self.new)]
        texts = batches(examples_of(self.split, self.weights, self.new))
        try:
            return compare(*backbones, texts, team).as_dict()
        except InputError:
            return None

    def _model(self, weights: AdaptedWeights, base: Base, own: bool = False) -> nn.Module:
        old = base if own else self.old
        return outdated_model(weights, old, base, self.task, weights.manifest.settings["seed"])

    def _along(self, ends: tuple[nn.Module, nn.Module], metric: str, file: Path | None, team: Team) -> dict[str, Any]:
        examples = {SPLIT: examples_of(self.split, self.weights, self.new)}
        rows = connectivity(
            ends,
            examples,
            self.task.problem,
            points=path_points(self.points),
            device=distributed.device(),
            file=file,
            key=_key(self.weights, [self.old, self.new], self.task, self.split, self.to),
            team=team,
        )
        mu, loss = [row["mu"] for row in rows], [row[SPLIT]["loss"] for row in rows]
        return {"mu": mu, "metric": [r[SPLIT][metric] for r in rows], "loss": loss, "barrier": barrier(mu, loss)}


def prepare(config: ProbeConfig, weights: AdaptedWeights, old: Base, new: Base, own: bool) -> Trial:
    """Check everything that can be checked before weights are read; raises InputError."""
    task = load_task(config.task)
    require_same_labels(weights, task)
    if SPLIT not in task.splits:
        raise InputError(config.task, f"has no {SPLIT} split to try the weights on, found {sorted(task.splits)}")
    for base in (old, new):
        models.require_length(base.folder, weights.manifest.settings["max_length"])
    to = None
    if config.to is not None:
        to = AdaptedWeights(find(config.to, config.store), verify=False)
        if claimed_relation(to, new) != "own":
            raise InputError(to.folder, f"was tuned on {to.manifest.base['name']!r}, expected weights of {new.folder}")
        require_same_labels(to, task)
        require_same_tuning(to, weights, ": no path leads there")
    split = limit(task.splits[SPLIT], config.examples, weights.manifest.settings["seed"])
    return Trial(weights, old, new, task, split, config.points, to, own)


def compatibility(
    weights: AdaptedWeights,
    bases: Sequence[Base],
    task: Task,
    split: Split,
    out: Path | None = None,
    team: Team | None = None,
) -> list[dict[str, float]]:
    """Loss and scores of weights applied unchanged to each base of a chain; a collective.

    Args:
        bases: the weights' own first, then its descendants.
        out: finished bases are kept in out/compatibility.json.
    """
    seed = weights.manifest.settings["seed"]

    def on(base: Base) -> dict[str, float]:
        model = fill(outdated_model(weights, bases[0], base, task, seed)).eval().to(distributed.device())
        return measure(model, examples_of(split, weights, base), task.problem)

    found = measured(
        {str(i): base for i, base in enumerate(bases)},
        on,
        file=out and out / "compatibility.json",
        key=_key(weights, bases, task, split),
        team=team or distributed.Ranks(),
        label="compatibility",
    )
    return list(found.values())


def knowing_nothing(task: Task, split: Split) -> dict[str, float]:
    """Loss and scores of a model that knows no more than how train's labels are distributed.

    Classes are predicted by their frequencies (each counted once more, so that none is impossible), numbers by their
    mean.
    """
    labels = torch.tensor(split.labels)
    if task.labels:
        counts = np.bincount(task.splits["train"].labels, minlength=len(task.labels)) + 1
        constant = np.log(counts / counts.sum())
    else:
        constant = np.array([np.mean(task.splits["train"].labels)])
    predicted = np.tile(constant, (len(split), 1))
    return loss_and_scores(predicted, labels, task.problem)


def examples_of(split: Split, weights: AdaptedWeights, base: Base) -> LabelledTexts:
    """Tokenised as the weights' own examples were."""
    return LabelledTexts(split, load_tokenizer(base.folder), weights.manifest.settings["max_length"])


def _key(
    weights: AdaptedWeights, bases: Sequence[Base], task: Task, split: Split, to: AdaptedWeights | None = None
) -> str:
    """What tells one measurement from another: the content of weights, bases and examples."""
    chain = [sorted(base.hashed.tensor_digests().items()) for base in bases]
    files = [each and each.manifest.files for each in (weights, to)]
    return sha256_json([files, chain, task.digest, split.texts, split.pairs, weights.manifest.settings["max_length"]])
