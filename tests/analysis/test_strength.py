"""The search for strengths: finds the least loss of simple functions, the same way every time, with few trials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recyclable.analysis.strength import GRID, best, by_group, line_search


@pytest.mark.parametrize("lowest", [0.0, 0.3, 0.61, 1.0, 1.49, 7.0])
def test_a_line_search_comes_within_a_thirty_second_of_the_lowest_point_between_0_and_1_5(lowest: float) -> None:
    tried = line_search(lambda strength: (strength - lowest) ** 2)
    dense = np.linspace(0, 1.5, 4801)
    assert abs(best(tried) - dense[np.argmin((dense - lowest) ** 2)]) <= 1 / 32 + 1e-9
    assert len(tried) <= len(GRID) + 4 and all(0 <= strength <= 1.5 for strength in tried)


def test_of_equal_losses_the_strength_nearest_to_1_wins_and_a_loss_that_is_no_number_never() -> None:
    assert best({0.0: 2.0, 0.75: 2.0, 1.5: 2.0}) == 0.75
    assert best({0.0: 3.0, 1.0: math.nan, 1.5: 2.0}) == 1.5
    assert best(line_search(lambda _: math.nan)) == 1.0


def test_each_group_gets_its_own_strength() -> None:
    wanted, asked = {"embeddings": 0.25, "layer 0": 1.0, "layer 1": 1.5}, []

    def loss(scales):
        asked.append(dict(scales))
        return sum((scales[group] - lowest) ** 2 for group, lowest in wanted.items())

    common = line_search(lambda strength: loss(dict.fromkeys(wanted, strength)))
    found, lowest = by_group(loss, list(wanted), common)
    assert found == wanted and lowest == 0
    assert lowest <= min(common.values())
    before = list(asked)
    asked.clear()
    assert by_group(loss, list(wanted), line_search(lambda s: loss(dict.fromkeys(wanted, s)))) == (found, lowest)
    assert asked == before


def test_groups_that_change_nothing_keep_the_common_strength() -> None:
    common = line_search(lambda strength: (strength - 0.5) ** 2)
    assert by_group(lambda _: 0.0, ["a", "b"], common) == ({"a": 0.5, "b": 0.5}, 0.0)
