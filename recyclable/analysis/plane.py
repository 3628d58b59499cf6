"""The plane through three models' weights, and the grid on it that a loss surface is drawn from.

As Garipov et al. 2018 (arXiv 1802.10026, introduction) draw theirs: Gram-Schmidt makes two axes of the steps from the
first model to the others. A point is a weighted sum of the three, so that it is streamed like one of a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recyclable.analysis.connectivity import Blend, read_of
from recyclable.analysis.distance import Products, products, total
from recyclable.analysis.measure import measure
from recyclable.analysis.points import measured
from recyclable.data.examples import TaskExamples
from recyclable.tasks.parts.task import Task
from recyclable.weights.algebra import subtract
from recyclable.weights.team import ALONE, Team

Coordinates = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """Axes: x towards the second model, y the part of the way to the third that is perpendicular to x; units of L2."""

    second: float
    """The second model is at (second, 0), the first at (0, 0)."""
    third: Coordinates

    @classmethod
    def through(cls, steps: Products) -> Plane:
        """From the inner products of the steps from the first model to the second and third."""
        length = steps.l2(0)
        if not length:
            raise ValueError("the first two models are the same: no plane")
        along = float(steps.gram[0, 1]) / length
        height = float(np.sqrt(max(0.0, steps.gram[1, 1] - along**2)))
        if height <= 1e-6 * steps.l2(1):  # what rounding may leave of nothing
            raise ValueError("the three models lie on a line: no plane")
        return cls(length, (along, height))

    def factors(self, point: Coordinates) -> tuple[float, float, float]:
        """Factors of the three models at a point."""
        to_third = point[1] / self.third[1]
        to_second = (point[0] - to_third * self.third[0]) / self.second
        return 1 - to_second - to_third, to_second, to_third

    def grid(self, columns: int, rows: int, margin: float = 0.2) -> list[Coordinates]:
        """Points row by row from the lowest y, around the three models.

        Args:
            margin: how far beyond them, as a share of their extent.
        """
        axes = []
        for places, count in zip(
            ((0.0, self.second, self.third[0]), (0.0, self.third[1])), (columns, rows), strict=True
        ):
            beyond = margin * (max(places) - min(places))
            axes.append(np.linspace(min(places) - beyond, max(places) + beyond, count))
        return [(float(x), float(y)) for y in axes[1] for x in axes[0]]


def plane_through(models: Sequence[nn.Module], team: Team = ALONE) -> Plane:
    """The plane through three models, unread or not, in one pass over their weights; a collective."""
    first, *others = ({name: read_of(p) for name, p in model.named_parameters()} for model in models)
    shapes = {name: tuple(parameter.shape) for name, parameter in models[0].named_parameters()}

    def steps(name: str, start: int, stop: int) -> list[torch.Tensor]:
        origin = first[name](start, stop)
        return [subtract(each[name](start, stop), origin) for each in others]

    return Plane.through(total(products(steps, shapes, team).values()))


def surface(
    models: Sequence[nn.Module],
    examples: TaskExamples,
    task: Task,
    *,
    columns: int,
    rows: int,
    device: torch.device | str = "cpu",
    file: Path | None = None,
    key: str = "",
    team: Team = ALONE,
) -> dict[str, Any]:
    """Loss and scores on a grid of the plane through three models; a collective, restartable.

    Returns `models`: their three coordinates, and `points`: a row for each with x, y, loss and scores, row by row.
    """
    plane, blend = plane_through(models, team), Blend(models, device)

    def at(point: Coordinates) -> dict[str, float]:
        return {"x": point[0], "y": point[1], **measure(blend.place(plane.factors(point)), examples, task)}

    named = {str(number): point for number, point in enumerate(plane.grid(columns, rows))}
    found = measured(named, at, file=file, key=key, team=team, label="surface")
    return {"models": [(0.0, 0.0), (plane.second, 0.0), plane.third], "points": list(found.values())}
