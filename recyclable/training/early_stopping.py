"""When a run stops early: after so many evaluations in a row without a better score, as HF's EarlyStoppingCallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recyclable.config.settings import LearnSettings


def stopped(history: Sequence[Mapping[str, float]], settings: LearnSettings, metric: str) -> bool:
    """Whether a run is over after these evaluations, before its last step or at it.

    It is told by the history alone, which checkpoints have: a run that was killed stops where it would have stopped.
    """
    patience = settings.early_stopping_patience
    scores = [row[metric] for row in history] if patience is not None else []
    return patience is not None and without_gain(scores, settings.early_stopping_threshold) >= patience


def without_gain(scores: Sequence[float], threshold: float) -> int:
    """How many of the last scores, the higher the better, are not above the best before them by more than `threshold`.

    The best rises with every better score, though it be by less.
    """
    best, count = float("-inf"), 0
    for score in scores:
        count = 0 if score - best > threshold else count + 1
        best = max(best, score)
    return count
