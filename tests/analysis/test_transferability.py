"""LogME against the evidence written out as a Gaussian, and predictions against fits that really leave one out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from recyclable.analysis.transferability import _maximise, logme

DRAW = np.random.default_rng(1)


def world(count: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    features = DRAW.normal(size=(count, width)) * np.linspace(2, 0.1, width)
    return features, features @ DRAW.normal(size=width) + noise * DRAW.normal(size=count)


@pytest.mark.parametrize(("count", "width"), [(30, 5), (20, 45)])
def test_the_evidence_is_the_highest_that_a_gaussian_with_any_precisions_has(count: int, width: int) -> None:
    features, y = world(count, width, 0.5)

    def negative(logs: np.ndarray) -> float:
        prior, noise = np.exp(-logs)
        covariance = prior * features @ features.T + noise * np.eye(count)
        return -stats.multivariate_normal(np.zeros(count), covariance, allow_singular=True).logpdf(y) / count

    best = min(
        (optimize.minimize(negative, start, method="Nelder-Mead") for start in ([0, 0], [2, 2])), key=lambda r: r.fun
    )
    assert logme(features, y[:, None]).logme == pytest.approx(-best.fun, abs=1e-3)


def test_each_example_is_predicted_from_the_others() -> None:
    features, y = world(25, 6, 1.0)
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    ridge = _maximise(u, s**2, y, 6)[1]
    found = logme(features, y[:, None]).left_out[:, 0]
    for i in range(len(y)):
        f, t = np.delete(features, i, 0), np.delete(y, i)
        weights = np.linalg.solve(f.T @ f + ridge * np.eye(6), f.T @ t)
        assert found[i] == pytest.approx(features[i] @ weights, abs=1e-8)


def test_features_that_tell_classes_apart_score_higher_than_features_that_do_not() -> None:
    classes = np.eye(3)[np.arange(60) % 3]
    telling = classes @ DRAW.normal(size=(3, 10)) + 0.3 * DRAW.normal(size=(60, 10))
    silent = DRAW.normal(size=(60, 10))
    one, other = logme(telling, classes), logme(silent, classes)
    assert one.logme > other.logme
    right = [(of.left_out.argmax(1) == classes.argmax(1)).mean() for of in (one, other)]
    assert right[0] > 0.9 and right[1] < 0.6


@pytest.mark.parametrize("features", [np.zeros((9, 4)), np.ones((9, 1)), np.eye(9)])
def test_degenerate_features_have_a_finite_score(features: np.ndarray) -> None:
    found = logme(features, np.eye(3)[np.arange(9) % 3])
    assert np.isfinite(found.logme) and np.isfinite(found.left_out).all()
