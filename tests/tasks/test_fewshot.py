"""Few-shot draws: sizes, order, seeds, independence of classes."""

from __future__ import annotations

import pytest

from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.classification import Classification
from recyclable.tasks.parts.fewshot import k_shot, limit
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.regression import Regression


def make_split(labels: list[int] | list[float], pairs: bool = False) -> Split:
    texts = [f"text {i}" for i in range(len(labels))]
    return Split(texts, [f"pair {i}" for i in range(len(labels))] if pairs else None, labels)


def few(split: Split, k: int, seed: int, kind: type[TaskKind] = Classification) -> tuple[Split, dict[int, int]]:
    return k_shot(split, k, seed, kind().strata(split))


def test_k_shot_takes_k_of_each_class_in_the_order_of_the_split() -> None:
    sample, short = few(make_split([0, 1, 2] * 20), 4, seed=1)
    assert sorted(sample.labels) == [0] * 4 + [1] * 4 + [2] * 4
    positions = [int(text.split()[1]) for text in sample.texts]
    assert positions == sorted(set(positions))
    assert short == {}


def test_k_shot_keeps_text_pair_and_label_together() -> None:
    sample, _ = few(make_split([i % 3 for i in range(60)], pairs=True), 5, seed=3)
    for text, pair, label in zip(sample.texts, sample.pairs, sample.labels, strict=True):
        assert text.split()[1] == pair.split()[1]
        assert int(text.split()[1]) % 3 == label


def test_k_shot_takes_all_of_a_small_class_and_says_so() -> None:
    sample, short = few(make_split([0] * 10 + [1] * 2 + [2] * 3), 3, seed=1)
    assert [sample.labels.count(c) for c in range(3)] == [3, 2, 3]
    assert short == {1: 2}


def test_k_shot_is_the_same_for_a_seed_and_differs_between_seeds() -> None:
    split = make_split([0, 1] * 50)
    assert few(split, 5, seed=7) == few(split, 5, seed=7)
    assert len({tuple(few(split, 5, seed=s)[0].texts) for s in range(5)}) == 5


def test_k_shot_draw_is_pinned_for_good() -> None:
    assert few(make_split([0, 1] * 50), 3, seed=20)[0].texts == [f"text {i}" for i in (11, 20, 59, 60, 76, 95)]


def test_classes_of_the_same_size_get_different_draws() -> None:
    sample, _ = few(make_split([0] * 100 + [1] * 100), 10, seed=1)
    positions = [int(text.split()[1]) for text in sample.texts]
    assert positions[:10] != [p - 100 for p in positions[10:]]


def test_examples_added_to_one_class_leave_the_draw_of_another_alone() -> None:
    less = Split([f"a{i}" for i in range(40)] + [f"b{i}" for i in range(40)], None, [0] * 40 + [1] * 40)
    more = Split(["b new", *less.texts, "b last"], None, [1, *less.labels, 1])

    def of_class_0(split: Split) -> list[str]:
        return [text for text in few(split, 6, seed=2)[0].texts if text.startswith("a")]

    assert of_class_0(less) == of_class_0(more)


def test_a_smaller_k_draws_a_part_of_a_larger_one() -> None:
    split = make_split([0, 1, 2] * 30)
    assert set(few(split, 4, seed=1)[0].texts) < set(few(split, 8, seed=1)[0].texts)


def test_k_shot_of_regression_takes_k_examples_in_all() -> None:
    split = make_split([i / 10 for i in range(50)])
    sample, short = few(split, 8, 1, Regression)
    assert len(sample) == 8 and short == {}
    assert few(split, 80, 1, Regression) == (split, {0: 50})


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_an_input_error(k: int) -> None:
    with pytest.raises(InputError, match=f"k: {k} examples per class, expected at least 1"):
        few(make_split([0, 1]), k, 1)


def test_limit_takes_a_fixed_random_subset_in_order() -> None:
    split = make_split([0] * 100)
    sample = limit(split, 10, seed=1)
    positions = [int(text.split()[1]) for text in sample.texts]
    assert len(set(positions)) == 10 and positions == sorted(positions) and positions != list(range(10))
    assert limit(split, 10, seed=1) == sample
    assert limit(split, 10, seed=2) != sample


def test_limit_leaves_a_smaller_split_as_it_is() -> None:
    split = make_split([0, 1, 0], pairs=True)
    assert limit(split, 3, seed=1) == split
    assert limit(split, 30, seed=1) == split


def test_limit_below_one_is_an_input_error() -> None:
    with pytest.raises(InputError, match="limit: 0 examples"):
        limit(make_split([0, 1]), 0, 1)
