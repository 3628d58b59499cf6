"""What forward passes say of outdated weights: their score on both bases, and along the path between the two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from recyclable import distributed
from recyclable.analysis.connectivity import barrier, connectivity, path_points, shapes
from recyclable.analysis.measure import measure
from recyclable.analysis.points import measured
from recyclable.analysis.similarity import compare
from recyclable.analysis.verdict import Features, standard_error
from recyclable.carrying.carried import Carried
from recyclable.carrying.labels import in_order, require_same_rows
from recyclable.data.examples import TaskExamples
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.models.tasks import outdated_model, task_model
from recyclable.recipes.similarity import backbone, batches
from recyclable.tasks.parts.fewshot import limit
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import tokenised
from recyclable.weights.adapted import AdaptedWeights, require_same_model, require_same_tuning
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.hashes import sha256_json
from recyclable.weights.reader import Reader
from recyclable.weights.sources import fill
from recyclable.weights.team import Team

if TYPE_CHECKING:
    from recyclable.recipes.probe_settings import ProbeSettings

SPLIT = "dev"


@dataclass(frozen=True)
class Trial:
    """Outdated weights about to be tried on a task, everything checked."""

    carried: Carried
    task: Task
    split: Split
    points: int
    to: Carried | None
    """Weights tuned on the new base, at home there, where the path is to lead to them."""

    def run(self, evidence: dict[str, Any], out: Path | None, team: Team) -> Features:
        """Add what is found to `evidence`; a collective. Finished points are kept in `out`."""
        if self.to is not None:
            self.to.verify(team)
        bases = [self.carried.old, self.carried.new]
        scores = compatibility(self.carried.weights, bases, self.task, self.split, out, team)
        metric = self.task.kind.metrics(self.task.labels)[0]
        by_formula = [
            standard_error(metric, row[metric], len(self.split)) if "error" not in row else 0.0 for row in scores
        ]
        errors = [row.pop("error", formula) for row, formula in zip(scores, by_formula, strict=True)]
        floor, known = self._floor(metric, out, team)
        told = {"metric": metric, "examples": len(self.split), "old": scores[0], "new": scores[1], **known}
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
        values = {"old": scores[0][metric], "new": scores[1][metric], "floor": floor}
        floor_is = "the new base without any weights" if self.task.kind.over_vocabulary else Features.floor_is
        return Features(self.carried.own, **values, floor_is=floor_is, old_error=errors[0], new_error=errors[1])

    def _floor(self, metric: str, out: Path | None, team: Team) -> tuple[float, dict[str, Any]]:
        """The score of who knows nothing of the task, and what is told of it; a collective.

        Of answers in text the new base alone knows something without any weights: it counts, or a guess that is better.
        """
        kind, new = self.task.kind, self.carried.new
        nothing = knowing_nothing(self.task, examples_of(self.task, self.split, self.carried.weights, new))
        if not kind.over_vocabulary:
            chance = {"chance": 1 / len(self.task.labels)} if self.task.labels and kind.exclusive else {}
            return nothing[metric], {"majority": nothing, **chance}
        alone = bare(self.carried.weights, new, self.task, self.split, out, team)
        return max(nothing[metric], alone[metric]), {"base": alone, "guessing": nothing}

    def _paths(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The ends of each path there is: from the old model to the new one; an adapter's alone, on the new base.

        Bases with other shapes or tokenizers have no straight path between them.
        """
        carried = self.carried
        first, applied = self._model(carried.at_home), self._model(carried)
        last = applied if self.to is None else self._model(self.to)
        if carried.own and self.to is None:
            return {}
        if shapes(first) != shapes(last) or tokenizer_digest(carried.old) != tokenizer_digest(carried.new):
            return {}
        alone = {"adapter_alone": (applied, last)} if carried.weights.is_adapter and last is not applied else {}
        return {"path": (first, last), **alone}

    def _similarity(self, team: Team) -> dict[str, Any] | None:
        """How alike the two bases work on the dev examples, before any tuning; two models are in memory for it.

        None on their own base, for other tokenizers, and for models whose heads or neurons cannot be compared.
        """
        old, new = self.carried.old, self.carried.new
        if self.carried.own or tokenizer_digest(old) != tokenizer_digest(new):
            return None
        one, other = backbone(old, self.task), backbone(new, self.task)
        texts = batches(examples_of(self.task, self.split, self.carried.weights, new))
        try:
            return compare(one, other, texts, team).as_dict()
        except InputError:
            return None

    def _model(self, carried: Carried) -> nn.Module:
        return outdated_model(carried, self.task, carried.weights.manifest.settings["seed"])

    def _along(self, ends: tuple[nn.Module, nn.Module], metric: str, file: Path | None, team: Team) -> dict[str, Any]:
        weights, bases = self.carried.weights, [self.carried.old, self.carried.new]
        examples = {SPLIT: examples_of(self.task, self.split, weights, self.carried.new)}
        rows = connectivity(
            ends,
            examples,
            self.task,
            points=path_points(self.points),
            device=distributed.device(),
            file=file,
            key=_key(weights, bases, self.task, self.split, None if self.to is None else self.to.weights),
            team=team,
        )
        mu, loss = [row["mu"] for row in rows], [row[SPLIT]["loss"] for row in rows]
        return {"mu": mu, "metric": [r[SPLIT][metric] for r in rows], "loss": loss, "barrier": barrier(mu, loss)}


def prepare(config: ProbeSettings, source: str, carried: Carried) -> Trial:
    """Check everything that can be checked before weights are read; raises InputError.

    Args:
        source: the task, as `load_task` takes it.
    """
    weights = carried.weights
    task = in_order(weights, load_task(source))
    if SPLIT not in task.splits:
        raise InputError(source, f"has no {SPLIT} split to try the weights on, found {sorted(task.splits)}")
    to = None
    if config.to is not None:
        to = Carried.open(config.to, None, carried.new, store=config.store, allow_unrelated=True)
        if not to.own:
            wanted = f"expected weights of {carried.new.folder}"
            raise InputError(to.weights.folder, f"was tuned on {to.weights.manifest.base['name']!r}, {wanted}")
        require_same_rows(to.weights, task)
        require_same_tuning(to.weights, weights, ": no path leads there")
        require_same_model(to.weights, weights)
    split = limit(task.splits[SPLIT], config.examples, weights.manifest.settings["seed"])
    for base in (carried.old, carried.new):
        examples_of(task, split, weights, base)  # raises now what it would raise when a report has been begun
    return Trial(carried, task, split, config.points, to)


def compatibility(
    weights: AdaptedWeights,
    bases: Sequence[Base],
    task: Task,
    split: Split,
    out: Path | None = None,
    team: Team | None = None,
) -> list[dict[str, float]]:
    """Loss and scores of weights applied unchanged to each base of a chain, and `error` (`measure`); a collective.

    Args:
        bases: the weights' own first, then its descendants.
        out: finished bases are kept in out/compatibility.json.
    """
    seed, own = weights.manifest.settings["seed"], bases[0]

    def on(base: Base) -> dict[str, float]:
        carried = Carried(weights, own, base, allow_unrelated=True)
        model = fill(outdated_model(carried, task, seed)).eval().to(distributed.device())
        return measure(model, examples_of(task, split, weights, base), task, task.kind.metrics(task.labels)[0])

    found = measured(
        {str(i): base for i, base in enumerate(bases)},
        on,
        file=out and out / "compatibility.json",
        key=_key(weights, bases, task, split),
        team=team or distributed.Ranks(),
        label="compatibility",
    )
    return list(found.values())


def bare(
    weights: AdaptedWeights, base: Base, task: Task, split: Split, out: Path | None, team: Team
) -> dict[str, float]:
    """Loss and scores of a base without the weights, on the very tokens that it is asked about with them; a collective.

    Args:
        out: kept in out/base.json.
    """

    def alone(base: Base) -> dict[str, float]:
        model = task_model(base, task, weights.manifest.settings["seed"], fields=weights.manifest.config)
        model = fill(model).eval().to(distributed.device())
        return measure(model, examples_of(task, split, weights, base), task)

    key = _key(weights, [base], task, split)
    (found,) = measured(
        {"base": base}, alone, file=out and out / "base.json", key=key, team=team, label="base"
    ).values()
    return found


def knowing_nothing(task: Task, examples: TaskExamples) -> dict[str, float]:
    """Loss and scores of a model that knows no more than how train's labels are distributed."""
    return task.kind.knowing_nothing(task.splits["train"], examples, task.labels)


def examples_of(task: Task, split: Split, weights: AdaptedWeights, base: Base) -> TaskExamples:
    """Tokenised as the weights' own examples were."""
    return tokenised(task, split, Reader.of(base, weights), weights.manifest.settings["max_length"])


def _key(
    weights: AdaptedWeights, bases: Sequence[Base], task: Task, split: Split, to: AdaptedWeights | None = None
) -> str:
    """What tells one measurement from another: the content of weights, bases and examples."""
    chain = [sorted(base.hashed.tensor_digests().items()) for base in bases]
    files = [each and each.manifest.files for each in (weights, to)]
    return sha256_json([files, chain, task.digest, split.texts, split.pairs, weights.manifest.settings["max_length"]])
