"""Scores of predictions: accuracy and F1, of one class or of several; Pearson, Spearman and mean squared error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def of_classes(predictions: np.ndarray, targets: Sequence[int] | np.ndarray) -> dict[str, float]:
    """accuracy and f1_macro, the mean over the classes that occur in targets or predictions.

    Args:
        predictions: logits [N, C] or class indices [N]; an example with a NaN logit counts as wrong.
        targets: class indices [N].

    Raises:
        ValueError: no examples, or shapes that do not fit.
    """
    predictions, truth = _checked(predictions, targets)
    if predictions.ndim == 2:
        broken = np.isnan(predictions).any(axis=1)
        predictions = np.where(broken, -1, np.where(np.isnan(predictions), -np.inf, predictions).argmax(axis=1))
    if predictions.ndim != 1:
        raise ValueError(f"predictions {predictions.shape}: expected [N, C] or [N]")
    return {"accuracy": float((predictions == truth).mean()), "f1_macro": _f1_macro(predictions, truth)}


def of_sets(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """f1_micro over all labels of all texts, f1_macro, and accuracy: the share of texts whose labels are all right.

    F1 is 0 where neither side has any label; f1_macro is the mean over all labels, as scikit-learn has it.

    Args:
        predictions: logits [N, C], above 0 where a label is told; of a text with a NaN logit all labels are wrong.
        targets: 0 or 1 for each label [N, C].

    Raises:
        ValueError: no examples, or shapes that do not fit.
    """
    predictions, truth = np.asarray(predictions), np.asarray(targets) == 1
    if truth.ndim != 2 or not truth.size or predictions.shape != truth.shape:
        raise ValueError(f"predictions {predictions.shape} and targets {truth.shape}: expected [N, C] of each")
    found = np.where(np.isnan(predictions).any(axis=1, keepdims=True), ~truth, predictions > 0)
    hits, sizes = (found & truth).sum(axis=0), found.sum(axis=0) + truth.sum(axis=0)
    macro, micro = 2 * hits / np.maximum(sizes, 1), 2 * hits.sum() / max(sizes.sum(), 1)
    right = (found == truth).all(axis=1)
    return {"f1_micro": float(micro), "f1_macro": float(macro.mean()), "accuracy": float(right.mean())}


def of_numbers(predictions: np.ndarray, targets: Sequence[float] | np.ndarray) -> dict[str, float]:
    """pearson, spearman (both 0 where either side is constant) and mse; all NaN if a prediction is.

    Args:
        predictions: [N] or [N, 1].
        targets: [N].

    Raises:
        ValueError: no examples, or shapes that do not fit.
    """
    predictions, truth = _checked(predictions, targets)
    if predictions.shape not in ((len(truth),), (len(truth), 1)):
        raise ValueError(f"predictions {predictions.shape}: expected [N] or [N, 1]")
    x, y = predictions.reshape(-1).astype(np.float64), truth.astype(np.float64)
    if np.isnan(x).any():
        return dict.fromkeys(("pearson", "spearman", "mse"), float("nan"))
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y)), "mse": float(((x - y) ** 2).mean())}


def _checked(predictions: np.ndarray, targets: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predictions, truth = np.asarray(predictions), np.asarray(targets)
    if truth.ndim != 1 or len(truth) == 0 or len(predictions) != len(truth):
        raise ValueError(f"predictions {predictions.shape} and targets {truth.shape}: expected N > 0 of each")
    return predictions, truth


def _f1_macro(predictions: np.ndarray, truth: np.ndarray) -> float:
    """Mean of 2 TP / (predicted + true) over the classes that occur; -1 marks a prediction of no class."""
    classes = np.union1d(truth, predictions[predictions != -1])
    hits = np.array([((predictions == c) & (truth == c)).sum() for c in classes])
    sizes = np.array([(predictions == c).sum() + (truth == c).sum() for c in classes])
    return float((2 * hits / sizes).mean())


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    # scaled first, so that squares of tiny or huge values neither vanish nor overflow
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties share their mean rank."""
    _, group, sizes = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]
