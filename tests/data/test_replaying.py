"""Old text beside the new: an exact share of every stretch of steps, in an order that seed and step alone decide."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recyclable.data.order import Order, Replaying, share_of_step


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 50), st.integers(1, 17), st.integers(0, 3))
def test_the_share_of_old_examples_is_exact(new: int, old: int, percent: int, batch: int, seed: int) -> None:
    order, seen = Replaying(new, old, percent / 100, batch, seed), Counter()
    for step in range(30):
        items = order.step(step)
        assert len(items) == batch
        seen.update(index >= new for _, index in items)
        assert seen[True] == (step + 1) * batch * percent // 100
    assert order.step(7) == Replaying(new, old, percent / 100, batch, seed).step(7)


def test_both_texts_are_read_once_an_epoch_as_each_would_be_alone() -> None:
    order = Replaying(50, 9, 0.25, 8, seed=3)
    items = [item for step in range(100) for item in order.step(step)]
    new = sorted(item for item in items if item[1] < 50)
    old = sorted((epoch, index - 50) for epoch, index in items if index >= 50)
    assert len(new) == 600 and len(old) == 200
    assert Counter(new) == Counter(Order(50, 1, 3).stream(0, 600))
    assert Counter(old) == Counter(Order(9, 1, 3).stream(0, 200))


def test_ranks_share_old_text_alike_in_the_long_run() -> None:
    order = Replaying(1000, 1000, 0.5, 16, seed=1)
    counts = Counter()
    for step in range(500):
        for rank in (0, 1):
            shares = share_of_step(order.step(step), rank, 2, 8)
            counts[rank] += sum(index >= 1000 for share in shares for _, index in share)
    assert counts[0] + counts[1] == 500 * 16 * Fraction(1, 2)
    assert counts[0] / counts[1] == pytest.approx(1, abs=0.1)
