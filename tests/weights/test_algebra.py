"""Arithmetic on weights against numpy in float64, for arbitrary shapes, pieces and values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recyclable.weights import algebra

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes, seeds = st.integers(1, 400), st.integers(0, 2**32)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@given(sizes, seeds, st.floats(-3, 3), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_sums_are_rounded_once(size: int, seed: int, scale: float, of_base: torch.dtype, of_delta: torch.dtype) -> None:
    base, delta = draw(seed, size, dtype=of_base), draw(seed + 1, size, dtype=of_delta)
    got = algebra.add(base, delta, scale)
    exact = wide(base) + scale * wide(delta)
    assert got.dtype == of_base
    # half a unit in the last place of the result, and fp32's own error beneath it
    magnitude = np.abs(wide(base)) + np.abs(scale * wide(delta))
    bound = torch.finfo(of_base).eps / 2 * np.abs(exact) + 3e-7 * magnitude + torch.finfo(of_base).tiny
    assert (np.abs(wide(got) - exact) <= bound).all()
    bound = 1.2e-7 * (np.abs(wide(base)) + np.abs(wide(delta)))
    assert (np.abs(wide(algebra.subtract(delta, base)) - (wide(delta) - wide(base))) <= bound).all()


@given(sizes, seeds, st.floats(0, 1), st.sampled_from(DTYPES))
def test_interpolation_keeps_its_ends(size: int, seed: int, mu: float, dtype: torch.dtype) -> None:
    first, second = draw(seed, size, dtype=dtype), draw(seed + 1, size, dtype=dtype)
    found = algebra.weighted([first, second], [1 - mu, mu])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(wide(found), (1 - mu) * wide(first) + mu * wide(second), atol=1e-6)
    assert torch.equal(algebra.weighted([first, second], [1, 0]), first.float())
    assert torch.equal(algebra.weighted([first, second], [0, 1]), second.float())


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), sizes, seeds)
def test_a_weighted_sum_is_that_of_numpy(factors: list[float], size: int, seed: int) -> None:
    several = [draw(seed + i, size) for i in range(len(factors))]
    want = sum(factor * wide(tensor) for factor, tensor in zip(factors, several, strict=True))
    np.testing.assert_allclose(wide(algebra.weighted(several, factors)), want, atol=1e-4)


@given(sizes, seeds, st.floats(0.01, 1), st.integers(1, 50), st.booleans())
def test_a_threshold_keeps_just_the_density(size: int, seed: int, density: float, cut: int, coarse: bool) -> None:
    tensor = draw(seed, size)
    if coarse:  # many equal magnitudes
        tensor = (tensor * 2).round()
    threshold = algebra.magnitude_threshold(lambda: tensor.split(cut), density)
    ranked = np.sort(np.abs(tensor.numpy()))[::-1]
    assert threshold == ranked[max(1, int(np.ceil(density * size))) - 1]


def plain_ties(deltas: list[np.ndarray], thresholds: list[float]) -> np.ndarray:
    result = []
    for column in zip(*deltas, strict=True):
        kept = [d if abs(d) >= t else 0.0 for d, t in zip(column, thresholds, strict=True)]
        sign = np.sign(sum(kept))
        agreeing = [d for d in kept if d != 0 and np.sign(d) == sign]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(result)


@given(st.integers(1, 4), sizes, seeds, st.floats(0, 2))
def test_ties_is_the_papers(count: int, size: int, seed: int, threshold: float) -> None:
    deltas = [draw(seed + i, size) for i in range(count)]
    thresholds = [threshold + 0.1 * i for i in range(count)]
    np.testing.assert_allclose(
        wide(algebra.ties(deltas, thresholds)), plain_ties([wide(d) for d in deltas], thresholds), atol=1e-6
    )


@given(seeds, st.floats(0, 0.95), st.lists(st.integers(0, 150_000), max_size=4))
@settings(max_examples=20)
def test_dare_drops_the_same_elements_however_a_tensor_is_cut(seed: int, rate: float, cuts: list[int]) -> None:
    delta = torch.ones(150_000)
    whole = algebra.dare(delta, rate, seed, "x")
    cuts = sorted({0, len(delta), *cuts})
    pieces = [algebra.dare(delta[a:b], rate, seed, "x", a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    kept = (whole != 0).double().mean().item()
    assert abs(kept - (1 - rate)) < 0.01  # 5 deviations of 150,000 draws
    np.testing.assert_allclose(wide(whole[whole != 0]), 1 / (1 - rate), rtol=1e-6)
    if rate > 0.1:
        assert not torch.equal(whole, algebra.dare(delta, rate, seed, "y"))
        assert not torch.equal(whole, algebra.dare(delta, rate, seed + 1, "x"))


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "slack"), [(40, 30, 10, 1e-6), (30, 40, 50, 1e-6), (300, 200, 4, 0.01)]
)
def test_low_rank_is_the_best_of_its_rank(rows: int, columns: int, rank: int, slack: float) -> None:
    matrix = draw(1, rows, columns) + 5 * draw(2, rows, 2) @ draw(3, 2, columns)
    left, right = algebra.low_rank(matrix, rank)
    u, s, vh = np.linalg.svd(wide(matrix), full_matrices=False)
    r = min(rank, rows, columns)
    best = np.linalg.norm(wide(matrix) - (u[:, :r] * s[:r]) @ vh[:r])
    assert left.shape == (rows, r) and right.shape == (r, columns)
    assert np.linalg.norm(wide(matrix) - wide(left) @ wide(right)) <= best * (1 + slack) + 1e-5 * np.linalg.norm(
        wide(matrix)
    )


@given(st.integers(1, 20), st.integers(1, 40), seeds)
def test_one_bit_has_the_sign_of_each_and_the_mean_of_each_row(rows: int, columns: int, seed: int) -> None:
    matrix = draw(seed, rows, columns)
    back = algebra.from_one_bit(*algebra.one_bit(matrix), columns)
    expected = np.where(wide(matrix) >= 0, 1.0, -1.0) * np.abs(wide(matrix)).mean(1, keepdims=True)
    np.testing.assert_allclose(wide(back), expected, rtol=1e-5)


@given(seeds, st.lists(st.integers(0, 150_000), max_size=4))
@settings(max_examples=20)
def test_random_signs_are_the_same_however_a_tensor_is_cut_and_leave_magnitudes(seed: int, cuts: list[int]) -> None:
    delta = draw(seed, 150_000)
    whole = algebra.random_signs(delta, seed, "x")
    cuts = sorted({0, len(delta), *cuts})
    pieces = [algebra.random_signs(delta[a:b], seed, "x", a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(whole.abs(), delta.float().abs())
    assert abs((whole == delta.float()).double().mean().item() - 0.5) < 0.01  # 7 deviations of 150,000 draws
    assert not torch.equal(whole, algebra.random_signs(delta, seed, "y"))
    assert not torch.equal(whole, algebra.random_signs(delta, seed + 1, "x"))
