"""Scores of generated answers: worked examples, and longest common subsequences found by trying all of them."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from recyclable.tasks.parts.answers import of_answers


def scores(found: str, wanted: str) -> tuple[float, float, float]:
    told = of_answers([found], [wanted])
    return told["exact_match"], told["f1"], told["rouge_l"]


@pytest.mark.parametrize(
    ("found", "wanted", "exact", "f1", "rouge"),
    [
        ("Paris", " Paris\n", 1, 1, 1),
        ("paris", "Paris", 0, 1, 1),
        ("The Paris.", "Paris", 0, 1, 2 / 3),  # SQuAD leaves articles out, ROUGE does not
        ("in Paris, France", "Paris France", 0, 4 / 5, 4 / 5),
        ("France Paris", "Paris France", 0, 1, 1 / 2),  # order counts in a subsequence
        ("no", "yes", 0, 0, 0),
        ("", "yes", 0, 0, 0),
        ("", "", 1, 1, 0),
        ("the", "a", 0, 1, 0),  # nothing but articles: neither has a word
        ("no no no", "no", 0, 1 / 2, 1 / 2),
        ("naïve café", "Naïve café!", 0, 1, 1),
        ("東京 都", "東京 都", 1, 1, 1),
        ("a_b", "a b", 0, 0, 1),
    ],
)
def test_worked_examples(found: str, wanted: str, exact: float, f1: float, rouge: float) -> None:
    assert scores(found, wanted) == pytest.approx((exact, f1, rouge), abs=1e-6)


def longest_common(first: list[str], second: list[str]) -> int:
    """By brute force."""
    for length in range(min(len(first), len(second)), 0, -1):
        if set(combinations(first, length)) & set(combinations(second, length)):
            return length
    return 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    random.seed(0)
    pairs = [[random.choices("xyz", k=random.randint(1, 7)) for _ in range(2)] for _ in range(40)]
    wanted = [2 * longest_common(a, b) / (len(a) + len(b)) for a, b in pairs]
    found = of_answers([" ".join(a) for a, _ in pairs], [" ".join(b) for _, b in pairs])
    assert found["rouge_l"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)


def test_scores_are_means_over_answers() -> None:
    assert of_answers(["yes", "no"], ["yes", "yes"]) == {"exact_match": 0.5, "f1": 0.5, "rouge_l": 0.5}


@pytest.mark.parametrize(("found", "wanted"), [([], []), (["a"], ["a", "b"])])
def test_as_many_answers_as_there_should_be_are_expected(found: list[str], wanted: list[str]) -> None:
    with pytest.raises(ValueError):
        of_answers(found, wanted)
