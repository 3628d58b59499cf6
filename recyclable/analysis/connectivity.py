"""Mode connectivity: loss and scores along the straight path between two models' weights, and its barrier.

"Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 4) evaluates 26 points
(1 - mu) theta_a + mu theta_b between the models adapted before and after an upgrade. Both must come from the same draw
of head and adapter, or the barrier measures the draw.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recyclable.analysis.measure import measure
from recyclable.analysis.points import measured
from recyclable.data.examples import TaskExamples
from recyclable.tasks.parts.task import Task
from recyclable.weights.algebra import weighted
from recyclable.weights.sources import Read, Unread, become, held, read_into
from recyclable.weights.team import ALONE, Team

POINTS = 26
"""The paper's number of points."""


class Blend:
    """One model whose weights are a weighted sum of several models' weights, read by range: no other is in memory.

    Args:
        models: of one structure, unread (`weights.sources`) or with values. ValueError where names or shapes differ.
        device: where the model lies.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device | str = "cpu") -> None:
        self._reads = [{name: read_of(p) for name, p in each.named_parameters()} for each in models]
        if any(shapes(each) != shapes(models[0]) for each in models):
            raise ValueError("models of different structures cannot be blended")
        self.model = copy.deepcopy(models[0]).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            become(parameter, nn.Parameter(torch.empty(parameter.shape, device=device), requires_grad=False))
        self.model.to(device)  # its buffers

    def place(self, factors: Sequence[float]) -> nn.Module:
        """The model with sum_i factors[i] weights_i, in fp32; the weights of one alone are exactly its own."""
        used = [(factor, reads) for factor, reads in zip(factors, self._reads, strict=True) if factor != 0]
        read_into(
            (parameter.view(-1), partial(_sum, [(factor, reads[name]) for factor, reads in used]), 0)
            for name, parameter in self.model.named_parameters()
        )
        return self.model


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Name -> shape of a model's parameters."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def read_of(parameter: nn.Parameter) -> Read:
    """Where a parameter's values come from, unread or not."""
    return parameter.read if isinstance(parameter, Unread) else held(parameter)


def _sum(parts: Sequence[tuple[float, Read]], start: int, stop: int) -> torch.Tensor:
    return weighted([read(start, stop).cpu() for _, read in parts], [factor for factor, _ in parts])


def straight(mu: float) -> tuple[float, float]:
    """Factors of the two ends at a point of the straight path."""
    return 1 - mu, mu


def path_points(count: int = POINTS) -> list[float]:
    """mu of `count` points, both ends among them."""
    return [i / (count - 1) for i in range(count)]


def connectivity(
    models: Sequence[nn.Module],
    examples: Mapping[str, TaskExamples],
    task: Task,
    *,
    points: Sequence[float],
    weigh: Any = straight,
    device: torch.device | str = "cpu",
    file: Path | None = None,
    key: str = "",
    team: Team = ALONE,
) -> list[dict[str, Any]]:
    """Loss and scores at points of a path through the weights of models; a collective, restartable.

    Args:
        models: the ends of a straight path, or what `weigh` has factors for (`analysis.curve`). Ends of adapters on two
            bases move the backbone as well; on one base, the adapter alone.
        examples: split -> examples.
        weigh: mu -> the models' factors.
        file, key, team: as for `analysis.points.measured`; every member has one model in memory.

    Returns a row per point: `mu`, and for each split loss and scores.
    """
    blend = Blend(models, device)

    def at(mu: float) -> dict[str, Any]:
        model = blend.place(weigh(mu))
        return {"mu": mu, **{split: measure(model, of, task) for split, of in examples.items()}}

    named = {f"{mu:.6f}": mu for mu in points}
    return list(measured(named, at, file=file, key=key, team=team, label="path").values())


def barrier(mu: Sequence[float], loss: Sequence[float]) -> float:
    """The highest rise of the loss over the straight line between the losses of the ends; never below 0.

    max over mu of loss(mu) - ((1 - mu) loss(0) + mu loss(1)): Entezari et al. 2022 (arXiv 2110.06296). Frankle et al.
    2020 (arXiv 1912.05671), where it comes from, compare with the mean of the two ends instead.
    """
    at, height = np.asarray(mu, np.float64), np.asarray(loss, np.float64)
    first, last = height[at.argmin()], height[at.argmax()]
    return float(max(0.0, (height - ((1 - at) * first + at * last)).max()))
