"""The verdict of a probe: what to do with outdated weights, by a rule on what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Method = Literal["apply", "init", "distill", "both", "scratch"]
_DRAWS = 2000


@dataclass(frozen=True)
class Thresholds:
    """All of the rule's numbers."""

    keep: float = 0.95
    """From this share of their worth on, outdated weights are applied as they are."""
    start: float = 0.2
    """From this share on they are a start; below it they only teach."""
    errors: float = 2.0
    """Standard errors by which the old model must beat knowing nothing to teach anything."""


RULE = Thresholds()
FITTED_ON = "classification"
"""The kind of task that the rule's numbers were fitted on."""


@dataclass(frozen=True)
class Features:
    """What a probe measured; None is what it did not."""

    own: bool
    """The weights belong to this very base."""
    old: float | None = None
    """Score of the outdated weights on their own base."""
    new: float | None = None
    """Their score on the new base, unchanged."""
    floor: float | None = None
    """Score of knowing nothing: the most frequent class; 0 for a correlation; of answers in text the base alone."""
    floor_is: str = "knowing nothing of the task"
    """What scores that."""
    old_error: float = 0.0
    """Standard error of `old` (`standard_error`)."""
    new_error: float = 0.0

    @property
    def worth(self) -> float:
        """What the outdated weights score on their own base, over knowing nothing; where a task was tried."""
        assert self.old is not None and self.floor is not None, "no task was tried"
        return self.old - self.floor

    @property
    def left(self) -> float:
        """The share of their worth that is left on the new base."""
        assert self.new is not None and self.floor is not None, "no task was tried"
        return (self.new - self.floor) / self.worth


@dataclass(frozen=True)
class Verdict:
    """A recommendation."""

    method: Method
    gain: float | None = None
    """The score there is to win, over knowing nothing: what the start has before any training, or the teacher knows."""
    confidence: float | None = None
    """How often the rule says the same when the scores are drawn anew from their sampling errors."""
    reason: str = ""


def judge(features: Features, rule: Thresholds = RULE) -> Verdict:
    """What to do with outdated weights.

    Their worth is their score on their own base minus knowing nothing, and what counts is the share that is left on the
    new base: nearly all of it, apply; some, both (a start and a teacher); hardly any, distil; no worth to begin with,
    start afresh. Without a task there is only the finding that starting from outdated weights costs nothing: init.

    The thresholds are fitted to 20 pairs of outdated weights and a new base, four tasks, 32 labels a class
    (docs/five_domains.md): chosen on three tasks and tested on the fourth, the rule names a method within a point of
    the best in 18 of 20. A band for init between apply and both, and the barrier on the path, were in that fit as well
    and improved nothing. `confidence` knows of sampling errors alone (as if those of the two scores were independent),
    not of how often the rule itself is wrong; from weights alone there is none.
    """
    if features.old is None or features.new is None or features.floor is None:
        method, reason = _without_task(features)
        return Verdict(method, reason=reason)
    method, reason = recommend(features, rule)
    gain = {"scratch": 0.0, "distill": features.worth}.get(method, features.new - features.floor)
    return Verdict(method, gain, _confidence(features, method, rule), reason)


def _without_task(features: Features) -> tuple[Method, str]:
    if features.own:
        return "apply", "The weights were tuned on this very base."
    return "init", "Nothing but weights was looked at: to start from them costs no more than to start afresh."


def recommend(features: Features, rule: Thresholds) -> tuple[Method, str]:
    """The method that the rule names where a task was tried, and why."""
    if features.worth <= rule.errors * features.old_error or features.worth <= 0:
        return "scratch", f"On their own base the old weights do not do better than {features.floor_is}."
    left = features.left
    share = f"{100 * left:.0f}% of what the old weights are worth"
    if left >= rule.keep:
        return "apply", f"On the new base, unchanged, {share} is left: there is little for training to bring back."
    if left >= rule.start:
        return "both", f"{share} is left: a start, and the old model can teach the rest."
    return "distill", f"Only {share} is left on the new base: a poor start, but the old model can teach."


def _confidence(features: Features, method: Method, rule: Thresholds) -> float:
    draw = np.random.default_rng(0)
    errors = draw.normal(size=(_DRAWS, 2)) * (features.old_error, features.new_error)
    drawn = (replace(features, old=features.old + old, new=features.new + new) for old, new in errors)
    return sum(recommend(each, rule)[0] == method for each in drawn) / _DRAWS


def standard_error(metric: str, value: float, examples: int) -> float:
    """Of a score on so many examples: a share's sqrt(p (1 - p) / n), a correlation's (1 - r^2) / sqrt(n - 1).

    For macro F1, which has no such formula, the share's.
    """
    if metric in ("pearson", "spearman"):
        return (1 - value**2) / max(1, examples - 1) ** 0.5
    return (value * (1 - value) / examples) ** 0.5
