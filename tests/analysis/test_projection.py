"""The projection of differences: what plain numpy gives, in every range, and what it learns from known tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recyclable.analysis import projection
from recyclable.analysis.projection import RIDGES, Projected, learn, look, settle

WIDTH, RANK = 8, 3
SHAPES = {"words": (40, 8), "dense.weight": (8, 12), "query.weight": (8, 8), "bias": (12,), "other": (5, 6)}


class Plain:
    """Differences in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.names = tensors, sorted(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.tensors[name].reshape(-1)[start:stop].clone()


def drawn(seed: int) -> Plain:
    draw = torch.Generator().manual_seed(seed)
    return Plain({name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()})


def upgraded(old: Plain, seed: int) -> Plain:
    """Half of it kept, the rest noise."""
    noise = drawn(seed).tensors
    return Plain({name: 0.5 * tensor + 0.4 * noise[name] for name, tensor in old.tensors.items()})


OLD = [drawn(seed) for seed in (1, 2, 3)]
PAIRS = [(old, upgraded(old, seed)) for seed, old in enumerate(OLD, 10)]
NEW_TASK = drawn(4)


def vectors(tensor: torch.Tensor, name: str) -> np.ndarray:
    """Rows along the width of the residual stream; along the shorter side where neither is; numbers of a bias."""
    array = tensor.double().numpy()
    return array.reshape(-1, 1) if array.ndim == 1 else array.T if name in ("dense.weight", "other") else array


def fitted(pairs: list, name: str, ridge: float, basis: np.ndarray):
    """The unscaled projection that pairs ask for, by least squares, as a function of vectors."""
    x = np.concatenate([vectors(old.tensors[name], name) for old, _ in pairs])
    y = np.concatenate([vectors(new.tensors[name], name) for _, new in pairs])
    u, v = x @ basis, y @ basis
    common = max(1e-3, (x * y).sum() / (x * x).sum())
    if math.isinf(ridge):
        return lambda z: common * z
    weight = ridge * np.mean((u * u).sum(0))
    # ridge regression as least squares with rows that draw the solution towards the common factor
    eye = np.sqrt(weight) * np.eye(basis.shape[1])
    inside = np.linalg.lstsq(np.concatenate([u, eye]), np.concatenate([v, common * eye]), rcond=None)[0]
    x_left, y_left = (np.append((z - z @ basis @ basis.T).ravel(), 0) for z in (x, y))
    drawn = weight * (basis.shape[0] - basis.shape[1])
    square = x_left @ x_left + drawn
    outside = max(1e-3, (x_left @ y_left + drawn * common) / square) if basis.shape[0] > basis.shape[1] else 1.0
    return lambda z: z @ basis @ inside @ basis.T + outside * (z - z @ basis @ basis.T)


def axes(name: str) -> np.ndarray:
    every = [vectors(plain.tensors[name], name) for pair in PAIRS for plain in pair]
    return np.linalg.svd(np.concatenate(every), full_matrices=False)[2][:RANK].T


def left_out_errors(names) -> dict[float, float]:
    """Each task as predicted from the others, by fitting anew."""
    errors: dict[float, list[float]] = {ridge: [] for ridge in RIDGES}
    for ridge, name, i in ((r, n, i) for r in RIDGES for n in names for i in range(len(PAIRS))):
        x, y = (vectors(of.tensors[name], name) for of in PAIRS[i])
        found = fitted(PAIRS[:i] + PAIRS[i + 1 :], name, ridge, axes(name))(x)
        errors[ridge].append(((found - y) ** 2).sum() / (y * y).sum())
    return {ridge: float(np.mean(of)) for ridge, of in errors.items()}


def oracle(name: str) -> np.ndarray:
    """The new task's projected vectors, from the formulas, by SVD of all vectors at once."""
    errors = left_out_errors([name])
    project = fitted(PAIRS, name, min(errors, key=errors.get), axes(name))
    x, y = (np.concatenate([vectors(pair[side].tensors[name], name) for pair in PAIRS]) for side in (0, 1))
    return np.linalg.norm(y) / np.linalg.norm(project(x)) * project(vectors(NEW_TASK.tensors[name], name))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("piece", [1 << 20, 96])
def test_a_tensor_is_projected_as_numpy_does(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "PIECE", piece)  # vectors come in one go, or three at a time
    projected = Projected(NEW_TASK, learn(PAIRS, [name], WIDTH, rank=RANK)[0], WIDTH)
    found = projected.read(name)
    wanted = oracle(name)
    wanted = wanted.T if name in ("dense.weight", "other") else wanted
    assert np.allclose(found.numpy(), wanted.reshape(-1), atol=1e-5)
    for start, stop in ((0, 1), (3, 11), (5, 5), (len(found) - 2, len(found))):
        assert torch.allclose(projected.read(name, start, stop), found[start:stop], atol=1e-6)


def test_the_ridge_is_the_one_with_which_each_task_is_best_told_from_the_others() -> None:
    errors = learn(PAIRS, list(SHAPES), WIDTH, rank=RANK)[1]
    assert errors == pytest.approx(left_out_errors(SHAPES), rel=1e-6)
    assert len(set(errors.values())) == len(RIDGES)


def test_tasks_that_have_no_turn_in_common_leave_the_new_one_as_it_is_but_for_its_length() -> None:
    """And so does one task alone."""

    def turned(plain: Plain, seed: int) -> Plain:
        turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))[0]
        return Plain({name: (0.5 * t + t @ turn if name == "words" else t) * 1.5 for name, t in plain.tensors.items()})

    pairs = [(old, turned(old, seed)) for seed, old in enumerate(OLD)]
    for known in (pairs, pairs[:1]):
        projected = Projected(NEW_TASK, learn(known, ["words"], WIDTH, rank=8)[0], WIDTH)
        assert torch.cosine_similarity(projected.read("words"), NEW_TASK.read("words"), 0) > 0.999
    assert learn(pairs[:1], ["words"], WIDTH, rank=8)[1] == {}


def test_where_two_tunings_went_opposite_ways_the_outdated_way_is_kept() -> None:
    pairs = [(old, Plain({name: -2 * tensor for name, tensor in old.tensors.items()})) for old in OLD[:1]]
    projected = Projected(NEW_TASK, learn(pairs, ["words"], WIDTH, rank=RANK)[0], WIDTH)
    assert torch.allclose(projected.read("words"), 2 * NEW_TASK.read("words"), rtol=1e-4)


def test_a_tensor_that_was_not_learned_stays() -> None:
    projected = Projected(NEW_TASK, learn(PAIRS, ["words"], WIDTH, rank=RANK)[0], WIDTH)
    assert projected.names == NEW_TASK.names and projected.shape("bias") == (12,)
    assert torch.equal(projected.read("bias", 2, 5), NEW_TASK.tensors["bias"][2:5])


def test_a_turn_of_the_residual_stream_is_found_and_holds_for_a_task_that_was_not_seen() -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]

    def turned(plain: Plain) -> Plain:
        tensors = plain.tensors
        return Plain({"words": tensors["words"] @ turn, "dense.weight": turn.T @ tensors["dense.weight"]})

    many = [drawn(seed) for seed in range(20, 60)]  # so that the ridge weighs little
    names = ["words", "dense.weight"]
    projected = Projected(NEW_TASK, learn([(x, turned(x)) for x in many], names, WIDTH, rank=8)[0], WIDTH)
    wanted = turned(NEW_TASK)
    for name in names:
        found, want = projected.read(name), wanted.read(name)
        assert torch.cosine_similarity(found, want, 0) > 0.999
        assert torch.cosine_similarity(NEW_TASK.read(name), want, 0) < 0.9


def test_the_projected_known_tasks_are_as_long_as_their_upgraded_differences() -> None:
    for network in (False, True):
        learned, _ = learn(PAIRS, list(SHAPES), WIDTH, rank=RANK, network=network)
        for name in SHAPES:
            found = [Projected(old, learned, WIDTH).read(name) for old in OLD]
            lengths = [sum(float(t.square().sum()) for t in of) for of in (found, [new.read(name) for _, new in PAIRS])]
            assert lengths[0] == pytest.approx(lengths[1], rel=1e-4), name


def bent(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * x) @ torch.tensor([[1.0, 0.5], [-0.5, 1.0]])


def test_a_network_follows_what_no_linear_map_does_the_same_way_every_time() -> None:
    draw = torch.Generator().manual_seed(5)
    known, unseen = torch.randn(3, 200, 2, generator=draw), torch.randn(100, 2, generator=draw)

    def found(seed: int | None, answers=bent):
        tasks = [lambda x=x: iter([(x[:90], answers(x[:90])), (x[90:], answers(x[90:]))]) for x in known]
        return settle(look(tasks, 2), 0.1, tasks, seed)

    linear, network, again = found(None), found(3), found(3)

    def wrong(projection) -> float:
        return float((projection(unseen) - bent(unseen)).square().mean())

    assert wrong(network) < 0.3 * wrong(linear)
    assert torch.equal(network(unseen), again(unseen))
    assert not torch.equal(network(unseen), found(4)(unseen))
    assert not network(torch.zeros(1, 2)).any()


def test_no_network_is_kept_where_it_does_not_help_the_last_task() -> None:
    draw = torch.Generator().manual_seed(6)
    known = torch.randn(3, 50, 2, generator=draw)
    tasks = [lambda x=x, sign=sign: iter([(x, x + sign * bent(x))]) for x, sign in zip(known, (1, 1, -1), strict=True)]
    assert settle(look(tasks, 2), math.inf, tasks, 3).network is None


@pytest.mark.parametrize("seed", [None, 1])
def test_where_tuning_changed_nothing_nothing_is_added_and_a_new_change_passes(seed: int | None) -> None:
    zeros = torch.zeros(6, 4)
    tasks = [lambda: iter([(zeros, zeros)])] * 2
    for ridge in RIDGES:
        found = settle(look(tasks, 3), ridge, tasks, seed)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(found(x), x) and not found(zeros).any()
