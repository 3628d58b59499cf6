"""How well frozen features answer a task, from a few labelled examples and no training: LogME.

You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning" (arXiv 2102.11005): the
evidence of a Bayesian linear model from features to labels, at the prior and noise that maximise it. With the ridge
that they amount to, each example is also predicted from all others.

Shapes: N examples, D features, C targets (a column per class, or the one number of a regression).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 200
_TOLERANCE = 1e-6  # relative, of the ridge


@dataclass(frozen=True)
class Evidence:
    """What features say about a task."""

    logme: float
    """Log evidence per example, mean over the targets; higher is better."""
    left_out: np.ndarray
    """[N, C]: predictions of each example from all others."""


def logme(features_ND: np.ndarray, targets_NC: np.ndarray) -> Evidence:
    """The evidence of a linear model without an intercept; sums in fp64.

    Args:
        targets_NC: one-hot classes, of those that occur, or numbers [N, 1].
    """
    features, targets = np.asarray(features_ND, np.float64), np.asarray(targets_NC, np.float64)
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    kept = s > 1e-10 * max(s[0], 1e-300)
    u, variances = u[:, kept], s[kept] ** 2
    evidences, left_out = [], []
    for y in targets.T:
        evidence, ridge = _maximise(u, variances, y, features.shape[1])
        shrink = variances / (variances + ridge)
        fitted, leverage = u @ (shrink * (u.T @ y)), (u**2) @ shrink
        evidences.append(evidence)
        # what the example itself contributes is taken out of its own prediction
        left_out.append((fitted - leverage * y) / np.maximum(1 - leverage, 1e-12))
    return Evidence(float(np.mean(evidences)), np.stack(left_out, axis=1))


def _maximise(u: np.ndarray, variances: np.ndarray, y: np.ndarray, width: int) -> tuple[float, float]:
    """Evidence per example of one target at the best prior precision alpha and noise precision beta; alpha / beta."""
    count, z = len(y), u.T @ y
    beyond = max(0.0, float(y @ y - z @ z))  # of the target, outside of what the features span
    ridge, tiny = 1.0, 1e-12
    for _ in range(_ROUNDS):
        effective = (variances / (variances + ridge)).sum()
        weights = (variances * z**2 / (variances + ridge) ** 2).sum()
        errors = (z**2 * (ridge / (variances + ridge)) ** 2).sum() + beyond
        alpha, beta = (effective + tiny) / (weights + tiny), (count - effective) / (errors + tiny)
        before, ridge = ridge, alpha / beta
        if abs(ridge - before) <= _TOLERANCE * before:
            break
    logs = np.log(alpha + beta * variances).sum() + (width - len(variances)) * np.log(alpha)
    fit = width * np.log(alpha) + count * np.log(beta) - logs - beta * errors - alpha * weights
    return float(fit - count * np.log(2 * np.pi)) / 2 / count, float(ridge)
