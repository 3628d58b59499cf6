"""The verdict's rule at its thresholds, and what its numbers mean."""

from __future__ import annotations

import numpy as np
import pytest

from recyclable.analysis.verdict import RULE, Features, judge, standard_error


def features(left: float, error: float = 0.0, old: float = 0.8) -> Features:
    """Weights worth `old` - 0.3, of which a share is left on the new base."""
    return Features(False, old, 0.3 + left * (old - 0.3), 0.3, error, error)


@pytest.mark.parametrize(
    ("left", "method"),
    [
        (1.1, "apply"),
        (0.96, "apply"),
        (0.9, "both"),
        (0.21, "both"),
        (0.1, "distill"),
        (-0.2, "distill"),
    ],
)
def test_the_share_of_their_worth_that_is_left_decides(left: float, method: str) -> None:
    found = judge(features(left))
    assert found.method == method and found.confidence == 1
    assert found.gain == pytest.approx(0.5 if method == "distill" else 0.5 * left)


def test_weights_that_know_nothing_are_left_alone() -> None:
    found = judge(features(0.9, old=0.32, error=0.03))
    assert (found.method, found.gain) == ("scratch", 0.0)
    assert judge(features(1.0, old=0.2)).method == "scratch"


def test_confidence_is_how_often_the_same_is_said_of_other_examples() -> None:
    sure, unsure = judge(features(0.7, error=0.005)), judge(features(RULE.start, error=0.02))
    assert sure.confidence > 0.99 and 0.4 < unsure.confidence < 0.6
    assert unsure == judge(features(RULE.start, error=0.02))


def test_without_a_task_there_is_neither_gain_nor_confidence() -> None:
    for own, method in ((True, "apply"), (False, "init")):
        found = judge(Features(own))
        assert (found.method, found.gain, found.confidence) == (method, None, None)


def test_standard_errors_are_those_of_simulations() -> None:
    draw = np.random.default_rng(1)
    shares = draw.binomial(200, 0.7, 5000) / 200
    assert standard_error("accuracy", 0.7, 200) == pytest.approx(shares.std(), rel=0.05)
    noise = draw.normal(size=(3000, 2, 200))
    x, y = noise[:, 0], 0.6 * noise[:, 0] + 0.8 * noise[:, 1]
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    assert standard_error("pearson", 0.6, 200) == pytest.approx(np.std(found), rel=0.05)
