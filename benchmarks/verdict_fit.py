"""How good the probe's verdict is: its thresholds chosen on some tasks, tested on another, beside constant advice.

A pair is outdated weights and a base they may be recycled for: what a probe measured, and of every method the test
score and its cost, the training examples it sees. Advice is judged by the score of the method it names; within a point
of the best method is as good as it. Thresholds are those with the least shortfall beyond that point, and of these
the cheapest, and of these the middle. The rival always names one method: the one that is best in the mean of the same
tasks. Figures, over all pairs, each judged by thresholds from the other tasks:
- `within_1_point`: share of pairs in which the named method is within one point of the best;
- `mean_test`, `mean_examples`: of the named methods;
- the same three for the rival (`constant_...`), and for each method if it were always named (`always`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from recyclable.analysis.verdict import RULE, Features, Thresholds, recommend, standard_error

METHODS = ("apply", "init", "distill", "both", "scratch")
POINT = 0.01
GRID = {
    "keep": (0.7, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.0, np.inf),
    "start": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6),
}


@dataclass(frozen=True)
class Pair:
    """Outdated weights and a new base."""

    task: str
    tuning: str
    new: str
    evidence: dict[str, Any]
    """What a probe's JSON says."""
    scores: dict[str, dict[str, float]]
    """Method -> `test`, `examples`."""

    @property
    def features(self) -> Features:
        """What the rule sees."""
        told = self.evidence["compatibility"]
        metric = told["metric"]
        old, new = (told[when][metric] for when in ("old", "new"))
        errors = [standard_error(metric, score, told["examples"]) for score in (old, new)]
        return Features(False, old, new, told["majority"][metric], *errors)


def measure(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The figures; a row per pair under `pairs`. Pairs without a score of every method are left out."""
    pairs = [pair for pair in pairs if set(METHODS) <= pair.scores.keys()]
    if len({pair.task for pair in pairs}) < 2:
        return {"pairs": len(pairs)}
    advised, constant, rows = [], [], []
    for task in dict.fromkeys(pair.task for pair in pairs):
        others, held = ([p for p in pairs if (p.task == task) == mine] for mine in (False, True))
        rule, rival = fit(others), _best_constant(others)
        for pair in held:
            named = recommend(pair.features, rule)[0]
            advised.append((pair, named))
            constant.append((pair, rival))
            rows.append(_row(pair, named, rival))
    fitted = fit(pairs)
    return {
        "count": len(pairs),
        "tasks": len({pair.task for pair in pairs}),
        **judged(advised),
        **{f"constant_{name}": value for name, value in judged(constant).items()},
        "always": {method: judged([(pair, method) for pair in pairs]) for method in METHODS},
        "best": judged([(pair, max(METHODS, key=lambda m: pair.scores[m]["test"])) for pair in pairs]),
        "thresholds": asdict(fitted),
        "with_them": judged([(pair, recommend(pair.features, fitted)[0]) for pair in pairs]),
        "rule_now": judged([(pair, recommend(pair.features, RULE)[0]) for pair in pairs]),
        "pairs": rows,
    }


def fit(pairs: Sequence[Pair]) -> Thresholds:
    """The thresholds of the grid whose advice falls least short; of equal ones the cheapest, of these the middle."""
    features = [pair.features for pair in pairs]

    def cost(rule: Thresholds) -> tuple[float, float]:
        named = [(pair, recommend(seen, rule)[0]) for pair, seen in zip(pairs, features, strict=True)]
        short = [max(0.0, _best(pair) - pair.scores[method]["test"] - POINT) for pair, method in named]
        return round(float(np.mean(short)), 6), float(np.mean([pair.scores[m]["examples"] for pair, m in named]))

    def places(rule: Thresholds) -> np.ndarray:
        return np.array([values.index(getattr(rule, name)) for name, values in GRID.items()])

    rules = [Thresholds(**dict(zip(GRID, values, strict=True))) for values in product(*GRID.values())]
    costs = {rule: cost(rule) for rule in rules}
    least = min(costs.values())
    equal = [rule for rule, of in costs.items() if of == least]
    middle = np.median([places(rule) for rule in equal], axis=0)
    return min(equal, key=lambda rule: float(np.abs(places(rule) - middle).sum()))


def judged(named: Sequence[tuple[Pair, str]]) -> dict[str, float]:
    """Shares and means of advice."""
    scores = [pair.scores[method] for pair, method in named]
    near = [_best(pair) - score["test"] <= POINT for (pair, _), score in zip(named, scores, strict=True)]
    means = {f"mean_{name}": float(np.mean([score[name] for score in scores])) for name in ("test", "examples")}
    return {"within_1_point": float(np.mean(near)), **means}


def _best(pair: Pair) -> float:
    return max(pair.scores[method]["test"] for method in METHODS)


def _best_constant(pairs: Sequence[Pair]) -> str:
    return max(METHODS, key=lambda method: np.mean([pair.scores[method]["test"] for pair in pairs]))


def _row(pair: Pair, named: str, rival: str) -> dict[str, Any]:
    scores = {method: pair.scores[method]["test"] for method in METHODS}
    short = 100 * (_best(pair) - scores[named])
    facts = {"task": pair.task, "tuning": pair.tuning, "new": pair.new, "left": pair.features.left}
    return {**facts, **scores, "named": named, "constant": rival, "short_of_best": short}
