"""How far weights are from each other, per layer and whole: L2, RMS and cosine, in one pass over the files.

The measures of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702): over flattened weights without the
task's head. Everything follows from the inner products of a few vectors (first weights, the step to the second,
tuning's step), which are summed in fp64, piece by piece, in threads, shared out to a team.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from recyclable.architectures.layers import LayerGroups
from recyclable.weights.algebra import subtract
from recyclable.weights.digest import element_pieces, in_threads
from recyclable.weights.team import ALONE, Team

_CHUNK = 1 << 16
"""Elements that are multiplied at a time: a few vectors of them in fp64 stay in a core's cache."""
Read = Callable[[str, int, int], Sequence[torch.Tensor]]
"""(tensor, start, stop) -> elements [start, stop) of each of k vectors, flat."""


class Weights(Protocol):
    """Named tensors by range: a base (`weights.base.Base`) or differences (`weights.differences`)."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Products:
    """The inner products of k vectors."""

    elements: int
    gram: np.ndarray
    """fp64 [k, k]"""

    def l2(self, i: int) -> float:
        """Norm of a vector."""
        return float(np.sqrt(max(0.0, self.gram[i, i])))

    def rms(self, i: int) -> float:
        """Root mean square of a vector's elements."""
        return self.l2(i) / max(1, self.elements) ** 0.5

    def cosine(self, i: int, j: int) -> float | None:
        """Between two vectors; None where one of them is zero."""
        lengths = self.l2(i) * self.l2(j)
        return float(np.clip(self.gram[i, j] / lengths, -1, 1)) if lengths else None

    def combined(self, combinations: Sequence[Sequence[float]]) -> Products:
        """Of linear combinations of the vectors: rows of k factors."""
        factors = np.array(combinations, np.float64)
        return Products(self.elements, factors @ self.gram @ factors.T)


def total(several: Iterable[Products]) -> Products:
    """Over the elements of all, one at least."""
    first, *others = several
    gram = sum((each.gram for each in others), first.gram)
    return Products(first.elements + sum(each.elements for each in others), gram)


def products(read: Read, shapes: Mapping[str, tuple[int, ...]], team: Team = ALONE) -> dict[str, Products]:
    """Inner products of k vectors for each tensor, the same to the last bit whatever the team; a collective.

    Args:
        read: asked for each range of each tensor once, by any thread, of one member of the team.
        shapes: of the tensors, all of which have elements.
    """

    def piece(task: tuple[str, int, int]) -> np.ndarray:
        vectors = list(read(*task))
        rows = torch.empty(len(vectors), _CHUNK, dtype=torch.float64)
        gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
        for parts in zip(*(vector.split(_CHUNK) for vector in vectors), strict=True):
            chunk = rows[:, : len(parts[0])]
            for row, part in zip(chunk, parts, strict=True):
                row.copy_(part)
            gram += chunk @ chunk.T
        return gram.numpy()

    tasks = element_pieces(shapes)
    found: dict[str, list[Products]] = {}
    for (name, start, stop), gram in zip(tasks, in_threads(piece, tasks, "distance", team=team), strict=True):
        found.setdefault(name, []).append(Products(stop - start, gram))
    return {name: total(pieces) for name, pieces in found.items()}


def distance(
    first: Weights, second: Weights, groups: LayerGroups, tuning: Weights | None = None, team: Team = ALONE
) -> dict[str, Any]:
    """How far `second` is from `first`, compared with how far tuning went; a collective.

    Args:
        first, second: two bases, or two differences.
        groups: the bases' layers.
        tuning: a difference of tuned weights from one of the bases; what it lacks it has not moved.

    Returns `whole`, `layers` (a list in model order, each with its `layer`) and `left_out`: tensors that only one has
    or that have another shape. An entry has elements; l2, rms of second - first; relative: l2 over the norm of first;
    cosine of first and second; with tuning also tuning_l2, tuning_rms; ratio: l2 / tuning_l2; tuning_cosine of the
    step and tuning. What does not exist (the cosine of nothing) is absent.
    """
    shapes = {n: first.shape(n) for n in first.names if n in set(second.names) and second.shape(n) == first.shape(n)}
    shapes = {name: shape for name, shape in shapes.items() if torch.Size(shape).numel()}
    tuned = {n for n in tuning.names if n in shapes and tuning.shape(n) == shapes[n]} if tuning is not None else set()

    def read(*piece: Any) -> list[torch.Tensor]:
        start = first.read(*piece)
        vectors = [start, subtract(second.read(*piece), start)]
        if tuning is not None:
            vectors.append(tuning.read(*piece) if piece[0] in tuned else torch.zeros(len(start)))
        return vectors

    found = products(read, shapes, team)
    layers = {layer: total(found[name] for name in names) for layer, names in groups.split(shapes).items()}
    return {
        "whole": _entry(total(layers.values())) if layers else {"elements": 0},
        "layers": [{"layer": layer, **_entry(of)} for layer, of in layers.items()],
        "left_out": sorted({*first.names, *second.names} - shapes.keys()),
    }


def _entry(of: Products) -> dict[str, float]:
    """What `distance` says, from the products of first, step and perhaps tuning."""
    entry: dict[str, float | None] = {"elements": of.elements, "l2": of.l2(1), "rms": of.rms(1)}
    entry["relative"] = of.l2(1) / of.l2(0) if of.l2(0) else None
    entry["cosine"] = of.combined([_unit(of, 0), _unit(of, 0, 1)]).cosine(0, 1)
    if len(of.gram) > 2:
        entry.update(tuning_l2=of.l2(2), tuning_rms=of.rms(2), tuning_cosine=of.cosine(1, 2))
        entry["ratio"] = of.l2(1) / of.l2(2) if of.l2(2) else None
    return {name: value for name, value in entry.items() if value is not None}


def _unit(of: Products, *vectors: int) -> list[float]:
    return [float(i in vectors) for i in range(len(of.gram))]
