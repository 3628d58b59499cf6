"""Outdated weights mapped as those of other tasks were, whose weights exist on both bases (`analysis.projection`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recyclable import distributed
from recyclable.analysis import projection
from recyclable.carrying.carried import Carried
from recyclable.carrying.places import adapter_head
from recyclable.carrying.putting import differences_of
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights, require_same_tuning
from recyclable.weights.base import Base
from recyclable.weights.differences import Differences
from recyclable.weights.store import find
from recyclable.weights.team import Team


@dataclass(frozen=True)
class KnownTask:
    """A task whose weights exist on both bases."""

    old: Carried
    """Its outdated weights, on their way like those of the new task."""
    new: Carried
    """Its weights on the new base, at home there."""

    def verify(self, team: Team) -> None:
        """After the reading: InputError where files or bases are not those that the manifests say; a collective."""
        for carried in (self.old, self.new):
            carried.verify(team)

    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        told: dict[str, Any] = {"task": self.new.weights.manifest.task["name"]}
        for when, carried in (("old", self.old), ("new", self.new)):
            told[when] = {"weights": str(carried.weights.folder), "files": carried.weights.manifest.files}
        return told


def open_known(pairs: Sequence[tuple[str, str]], store: str | None, carried: Carried, task: str) -> list[KnownTask]:
    """The known tasks; InputError where one is of other bases or another tuning, or is two tasks.

    Args:
        pairs: weights on the old base and on the new one, of each task.
        task: what is projected; a notice is given where one of them is the same.
    """
    known = []
    for place, (on_old, on_new) in enumerate(pairs):
        one = KnownTask(_opened(on_old, carried.old, carried, store), _opened(on_new, carried.new, carried, store))
        both = [each.weights.manifest.task for each in (one.old, one.new)]
        of_old, of_new = ({key: told[key] for key in ("name", "labels")} for told in both)
        if of_old != of_new:
            raise InputError(f"project_from.{place}", f"found weights of {of_old} and of {of_new}, expected one task's")
        if of_old["name"] == task:
            folder = one.new.weights.folder
            distributed.say(f"notice: {folder} is for {task} itself: the projection has seen the answer")
        known.append(one)
    return known


def _opened(weights: str, base: Base, carried: Carried, store: str | None) -> Carried:
    opened = Carried(AdaptedWeights(find(weights, store), verify=False), base, carried.new, allow_unrelated=True)
    require_same_tuning(opened.weights, carried.weights, f" as of {carried.weights.folder}")
    return opened


def projected(
    known: list[KnownTask],
    model: nn.Module,
    carried: Carried,
    differences: Differences,
    width: int,
    rank: int,
    network: bool,
    seed: int,
) -> tuple[Differences, dict[float, float]]:
    """Outdated differences mapped as those of the known tasks were, and `projection.learn`'s errors by ridge.

    The head stays as it is. A collective.

    Args:
        model: of the new base, which tells the head from the rest.
        width: of the residual stream; rank, network, seed: as for `projection.learn`.
    """
    head = adapter_head(model, carried.weights, carried.new) if carried.weights.is_adapter else set()
    shapes = {n: differences.shape(n) for n in differences.names if n not in head}
    pairs = []
    for one in known:
        pair = differences_of(one.old), differences_of(one.new)
        for each, theirs in zip((one.old, one.new), pair, strict=True):
            found = {n: theirs.shape(n) for n in theirs.names if n in shapes}
            for name, wanted in shapes.items():
                if found.get(name) != wanted:
                    problem = f"{name} is {found.get(name, 'missing')}, in {carried.weights.folder} {wanted}"
                    raise InputError(each.weights.folder, problem)
        pairs.append(pair)
    learned, errors = projection.learn(
        pairs, list(shapes), width, rank=rank, network=network, seed=seed, team=distributed.Ranks()
    )
    return projection.Projected(differences, learned, width), errors
