"""Texts of like length share a pass, as the least is computed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from recyclable.data.alike import alike
from recyclable.data.examples import ROUND_LENGTH_TO

LENGTHS = np.array([7, 120, 9, 64, 60, 8, 118, 33, 1, 127, 61, 16])


def cost(lengths: np.ndarray, each: int) -> int:
    """Of a pass."""
    return len(lengths) * -(-int(lengths.max()) // ROUND_LENGTH_TO) * ROUND_LENGTH_TO + each


@pytest.mark.parametrize(("device", "each"), [("cpu", 64), ("cuda", 4096)])
def test_no_other_passes_cost_less(device: str, each: int) -> None:
    found = alike(LENGTHS, device)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(LENGTHS)))
    told = np.concatenate([LENGTHS[places] for places in found])
    assert np.all(np.diff(told) <= 0), "longest first"
    ordered, inner = np.sort(LENGTHS)[::-1], range(1, len(LENGTHS))
    cuts = (cut for number in range(len(LENGTHS)) for cut in combinations(inner, number))
    least = min(sum(cost(part, each) for part in np.split(ordered, cut)) for cut in cuts)
    assert sum(cost(LENGTHS[places], each) for places in found) == least
    assert len(found) == (1 if device == "cuda" else 3)


def test_passes_are_no_larger_than_may_be_and_texts_of_one_length_keep_their_order() -> None:
    found = alike(np.array([5] * 7), "cpu", 3)
    assert [places.tolist() for places in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(len(places) <= 2 for places in alike(LENGTHS, "cuda", 2))


def test_no_texts_make_no_pass() -> None:
    assert alike(np.array([]), "cpu") == []
    assert [places.tolist() for places in alike(np.zeros(3), "cpu")] == [[0, 1, 2]], "of unknown length"
