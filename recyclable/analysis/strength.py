"""How strongly differences are added: found with forward passes only, on the loss of a few labelled examples.

A strength for all (line search: RE-Adapt, arXiv 2405.15007, has such a scalar), or one for each layer group (coordinate
descent). Deterministic; of equal losses the strength nearest to 1 wins, and none changes without a lower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths tried first."""
_HALVINGS = 2
_ROUNDS = 2


def line_search(loss: Callable[[float], float]) -> dict[float, float]:
    """Strength -> loss of all that were tried: the grid, then around its best in steps of 1/8 and 1/16."""
    tried = {strength: loss(strength) for strength in GRID}
    step = GRID[1] - GRID[0]
    for _ in range(_HALVINGS):
        step /= 2
        near = best(tried)
        for strength in (near - step, near + step):
            if GRID[0] <= strength <= GRID[-1]:
                tried[strength] = loss(strength)
    return tried


def best(tried: Mapping[float, float]) -> float:
    """The strength with the lowest loss; a loss that is no number is never it unless all are."""
    return min(tried, key=lambda strength: (_or_infinite(tried[strength]), abs(strength - 1)))


def by_group(
    loss: Callable[[Mapping[str, float]], float], groups: Sequence[str], common: Mapping[float, float]
) -> tuple[dict[str, float], float]:
    """A strength for each group, and the loss there.

    All groups start with the best common strength; then one group after the other tries the grid while the others stay,
    until a round changes nothing.

    Args:
        common: strength -> loss with the same strength everywhere, from `line_search`.
    """
    scales, lowest = dict.fromkeys(groups, best(common)), common[best(common)]
    for _ in range(_ROUNDS):
        before = dict(scales)
        for group in groups:
            tried = {s: loss({**scales, group: s}) for s in GRID if s != scales[group]}
            if tried[best(tried)] < lowest:
                scales[group], lowest = best(tried), tried[best(tried)]
        if scales == before:
            break
    return scales, lowest


def _or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
