"""Metrics against values worked out by hand and against definitions written as loops."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from recyclable.tasks.classification import Classification
from recyclable.tasks.parts.metrics import of_classes, of_numbers
from recyclable.tasks.regression import Regression


def confusion_f1(truth: list[int], predicted: list[int]) -> float:
    """Macro F1 from precision and recall, class by class."""
    scores = []
    for c in sorted(set(truth) | set(predicted)):
        tp = sum(t == c and p == c for t, p in zip(truth, predicted, strict=True))
        precision = tp / predicted.count(c) if c in predicted else 0.0
        recall = tp / truth.count(c) if c in truth else 0.0
        scores.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return sum(scores) / len(scores)


def slow_ranks(x: list[float]) -> list[float]:
    return [sum(other < v for other in x) + (sum(other == v for other in x) - 1) / 2 for v in x]


def slow_pearson(x: list[float], y: list[float]) -> float:
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xy = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(math.fsum((a - mx) ** 2 for a in x) * math.fsum((b - my) ** 2 for b in y))


def test_accuracy_and_macro_f1_worked_out_by_hand() -> None:
    # class 0: 2 of 3 found, 1 wrong: F1 = 4/6; class 1: 1 of 2, 1 wrong: 2/4; class 2: 1 of 1: 1
    result = of_classes(np.array([0, 0, 1, 1, 0, 2]), [0, 0, 0, 1, 1, 2])
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["f1_macro"] == pytest.approx((4 / 6 + 1 / 2 + 1) / 3)


def test_logits_are_reduced_to_the_largest() -> None:
    logits = np.array([[0.1, 0.9, 0.0], [2.0, -1.0, 1.0], [-3.0, -2.0, -1.0]])
    assert of_classes(logits, [1, 0, 2]) == {"accuracy": 1.0, "f1_macro": 1.0}
    assert of_classes(logits, [1, 0, 0])["accuracy"] == pytest.approx(2 / 3)


def test_macro_f1_counts_a_class_that_is_only_predicted_and_not_one_that_never_occurs() -> None:
    result = of_classes(np.array([0, 0, 2]), [0, 0, 0])
    assert result["f1_macro"] == pytest.approx((4 / 5 + 0) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_classification_agrees_with_the_definitions_on_random_labels(seed: int) -> None:
    rng = random.Random(seed)
    truth, predicted = ([rng.randrange(5) for _ in range(50)] for _ in range(2))
    result = of_classes(np.array(predicted), truth)
    assert result["accuracy"] == pytest.approx(sum(t == p for t, p in zip(truth, predicted, strict=True)) / 50)
    assert result["f1_macro"] == pytest.approx(confusion_f1(truth, predicted))


def test_an_example_with_nan_logits_counts_as_wrong() -> None:
    logits = np.array([[np.nan, np.nan], [0.0, 1.0], [np.nan, 0.0]])
    result = of_classes(logits, [0, 1, 1])
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["f1_macro"] == pytest.approx((0 + 2 / 3) / 2)


def test_regression_worked_out_by_hand() -> None:
    result = of_numbers(np.array([1.0, 2.0, 3.0, 4.0]), [1.0, 3.0, 2.0, 4.0])
    assert result == pytest.approx({"pearson": 0.8, "spearman": 0.8, "mse": 0.5})


def test_spearman_sees_order_only_and_pearson_sees_distance() -> None:
    x = np.arange(1.0, 8.0)
    result = of_numbers(np.exp(x)[:, None], list(x))
    assert result["spearman"] == pytest.approx(1.0)
    assert result["pearson"] < 0.9
    assert of_numbers(-x, list(x))["spearman"] == pytest.approx(-1.0)


@pytest.mark.parametrize("seed", range(5))
def test_regression_agrees_with_the_definitions_on_random_numbers_with_ties(seed: int) -> None:
    rng = random.Random(seed)
    x, y = ([float(rng.randrange(10)) for _ in range(40)] for _ in range(2))
    result = of_numbers(np.array(x), y)
    assert result["pearson"] == pytest.approx(slow_pearson(x, y))
    assert result["spearman"] == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)))
    assert result["mse"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 40)


def test_correlation_with_a_constant_is_zero() -> None:
    assert of_numbers(np.full(3, 0.1), [1.0, 2.0, 3.0])["pearson"] == 0.0
    assert of_numbers(np.array([1.0, 2.0]), [0.3, 0.3])["spearman"] == 0.0


@pytest.mark.parametrize("scale", [1e-200, 1e150])
def test_pearson_does_not_depend_on_scale(scale: float) -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert of_numbers(x * scale, [1.0, 2.0, 3.0])["pearson"] == pytest.approx(slow_pearson(list(x), [1, 2, 3]))


def test_a_nan_prediction_makes_all_regression_scores_nan() -> None:
    assert all(math.isnan(v) for v in of_numbers(np.array([1.0, np.nan]), [1.0, 2.0]).values())


@pytest.mark.parametrize(
    ("scores", "shape", "count"),
    [
        (of_classes, (0,), 0),
        (of_classes, (3, 2), 4),
        (of_classes, (2, 2, 2), 2),
        (of_numbers, (3, 2), 3),
        (of_numbers, (2,), 3),
    ],
)
def test_shapes_that_do_not_fit_are_refused(scores: Callable, shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        scores(np.zeros(shape), [0] * count)


def test_the_metrics_that_select_are_among_the_scores() -> None:
    for kind in (Classification(), Regression()):
        assert set(kind.metrics(("0", "1"))) <= set(kind.score(np.array([0, 1]), np.array([0, 1]), ("0", "1")))
        assert kind.metrics(("0", "1"))
