"""A trained curve between two models' weights: a quadratic Bezier (1-x)^2 w1 + 2x(1-x) p + x^2 w2, p trained.

Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (arXiv 1802.10026): x is drawn
uniformly at each step, the loss of the weights there is what p is trained on. One process, plain PyTorch; training
holds w1, w2 and p in memory, evaluating streams them (`analysis.connectivity`).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from recyclable.data.examples import TaskExamples
from recyclable.data.order import Order
from recyclable.objectives.of_task import task_objective
from recyclable.tasks.parts.kind import TaskKind
from recyclable.training.evaluation import to_device
from recyclable.weights.sources import fill


def bezier(x: float) -> tuple[float, float, float]:
    """Factors of first end, middle point and second end at a point of the curve."""
    return (1 - x) ** 2, 2 * x * (1 - x), x**2


def train_middle(
    first: nn.Module,
    second: nn.Module,
    examples: TaskExamples,
    kind: TaskKind,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    seed: int = 20,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The middle point p, a model of the ends' structure, trained with Adam from half-way between the ends.

    What the ends do not train (an adapter's backbone) stays half-way: there the curve is the straight path. Dropout is
    off. The same seed gives the same point.

    Args:
        first, second: unread or with values; they are left as they are.
    """
    ends = [fill(copy.deepcopy(end), device=device).to(device) for end in (first, second)]
    middle = copy.deepcopy(ends[0]).eval()
    w1, w2 = ({name: parameter.detach() for name, parameter in end.named_parameters()} for end in ends)
    with torch.no_grad():
        for name, parameter in middle.named_parameters():
            parameter.lerp_(w2[name], 0.5)
    p, objective = dict(middle.named_parameters()), task_objective(middle, kind)
    optimizer = torch.optim.Adam([each for each in p.values() if each.requires_grad], lr=learning_rate)
    order = Order(len(examples), batch_size, seed)
    for step in range(steps):
        at = bezier(float(np.random.default_rng((seed, step)).uniform()))
        batch = to_device(examples.batch(order.step(step)), device)
        weights = {f"student.{name}": at[0] * w1[name] + at[1] * p[name] + at[2] * w2[name] for name in p}
        optimizer.zero_grad()
        (functional_call(objective, weights, (batch,))["task"] / max(1, kind.count(batch))).backward()
        optimizer.step()
    return middle
