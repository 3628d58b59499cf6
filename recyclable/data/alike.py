"""Which texts share a pass: those of like length, so that little is filled up and few passes are made."""

from __future__ import annotations

import numpy as np

from recyclable.data.examples import ROUND_LENGTH_TO

_PASS_COSTS = {"cpu": 64, "cuda": 4096}
"""Tokens that a device might have computed in what it takes to make a pass at all; of others, what a GPU might."""


def alike(lengths: np.ndarray, device: str, most: int | None = None) -> list[np.ndarray]:
    """Texts in passes, the longest first: as the least is computed, filled up texts and passes counted.

    The same lengths make the same passes, wherever and whenever.

    Args:
        lengths: tokens of each text [N]; a pass is filled up to its longest, rounded up as batches are.
        device: its type.
        most: texts of a pass; None: any number.

    Returns:
        Places in `lengths`, each in one pass.
    """
    if not len(lengths):
        return []
    order = np.argsort(-lengths, kind="stable")
    filled = -(-lengths[order] // ROUND_LENGTH_TO) * ROUND_LENGTH_TO
    bounds = np.flatnonzero(np.concatenate([[True], filled[1:] != filled[:-1], [True]]))  # where a pass may end
    most, each = most or len(order), _PASS_COSTS.get(device, _PASS_COSTS["cuda"])
    least, begins = np.zeros(len(bounds)), np.zeros(len(bounds), dtype=int)
    for end in range(1, len(bounds)):
        rows = bounds[end] - bounds[:end]
        costs = least[:end] + rows * filled[bounds[:end]] + -(-rows // most) * each
        begins[end] = costs.argmin()
        least[end] = costs[begins[end]]
    passes: list[np.ndarray] = []
    end = len(bounds) - 1
    while end:
        chosen = order[bounds[begins[end]] : bounds[end]]
        passes[:0] = [chosen[start : start + most] for start in range(0, len(chosen), most)]
        end = begins[end]
    return passes
