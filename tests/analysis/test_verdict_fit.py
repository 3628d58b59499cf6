"""Choosing the verdict's thresholds: what can be told apart is, and a task is judged by the others."""

from __future__ import annotations

import pytest
import verdict_fit
from verdict_fit import Pair, fit, judged, measure


def pair(task: str, left: float, best: str, test: float = 0.8) -> Pair:
    """Weights worth .5 over .3, of which a share is left; one method scores `test`, the others .5."""
    told = {"metric": "accuracy", "examples": 10**6, "old": {"accuracy": 0.8, "loss": 0.5}}
    told |= {"new": {"accuracy": 0.3 + 0.5 * left, "loss": 0.6}, "majority": {"accuracy": 0.3, "loss": 1.0}}
    scores = {method: {"test": 0.5, "examples": 60.0} for method in verdict_fit.METHODS}
    scores["apply"]["examples"] = 1.0
    scores[best]["test"] = test
    return Pair(task, "full", "M1", {"compatibility": told}, scores)


def world(task: str) -> list[Pair]:
    return [pair(task, 0.97, "apply"), pair(task, 0.55, "both"), pair(task, 0.02, "distill")]


def test_thresholds_are_found_that_separate_what_can_be_separated() -> None:
    rule = fit(world("a"))
    assert 0.55 < rule.keep <= 0.97 and 0.02 < rule.start <= 0.55


def test_each_task_is_judged_by_thresholds_from_the_others() -> None:
    found = measure([*world("a"), *world("b"), *world("c")])
    assert found["count"] == 9 and found["tasks"] == 3
    assert found["within_1_point"] == 1 and found["mean_test"] == pytest.approx(0.8)
    assert found["constant_within_1_point"] == pytest.approx(1 / 3)
    odd = measure([*world("a"), *world("b"), pair("c", 0.97, "scratch")])  # nothing in a or b says so
    assert found["pairs"][-1]["named"] == "distill" and odd["pairs"][-1]["named"] == "apply"
    assert odd["pairs"][-1]["short_of_best"] == pytest.approx(30)


def test_within_a_point_of_the_best_the_cheapest_is_as_good() -> None:
    close = pair("a", 0.97, "both", test=0.509)
    assert fit([close]).keep <= 0.97
    assert judged([(close, "apply")]) == {"within_1_point": 1.0, "mean_test": 0.5, "mean_examples": 1.0}


def test_pairs_that_lack_a_method_are_left_out() -> None:
    lacking = pair("c", 0.5, "both")
    del lacking.scores["init"]
    assert measure([*world("a"), *world("b"), lacking])["count"] == 6
    assert measure([*world("a"), lacking]) == {"pairs": 3}
