"""Training-free recycling: a low-dimensional projection from outdated to upgraded differences, tensor by tensor.

"Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702) names training-free recycling by a projection that is
learned on tasks whose weights are known on both bases; the form is ours. All tasks read and write the same residual
stream, which an upgrade may turn and stretch, so a tensor is taken as vectors of the stream's width, x of outdated and
y of upgraded differences, and what some tasks' vectors have in common is applied to another's:

    y = length (outside x + (f(x B) - outside x B) B')

B: the leading principal axes of known x and y together. f: ridge regression of coefficients, drawn towards one common
factor, as is `outside`, the factor of what lies outside of the axes; or a small network on top of it. One ridge is
chosen for all tensors: the one with which each known task is best told from the others. Infinite, it leaves x alone but
for `length`, which makes known x as long as their y (a regression's predictions are too short). A tensor of one
dimension is taken as numbers. f(0) = 0: where tuning changed nothing, nothing is added.

Shapes: N vectors, n width, R axes, h units of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from recyclable.weights.algebra import flat_range
from recyclable.weights.differences import Changed, Differences
from recyclable.weights.digest import PIECE, in_threads
from recyclable.weights.sources import seed_of
from recyclable.weights.team import ALONE, Team

RIDGES = (0.1, 1.0, 10.0, 100.0, math.inf)
"""To choose from, in units of the mean variance along the axes."""
_LEAST = 1e-3
_UNITS, _STEPS, _RATE, _ROWS = 16, 200, 1e-2, 1 << 13
"""The network: hidden units, full-batch Adam steps and their rate, vectors it is trained on at most."""

Pair = tuple[Differences, Differences]
"""One task's differences on the old and on the new base."""
Blocks = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""Gives one task's vectors (x [N, n], y [N, n]) anew at each call, some at a time."""


@dataclass(frozen=True)
class Network:
    """A correction to ridge regression's coefficients: s tanh(u A / s) C, nothing at u = 0."""

    into: torch.Tensor
    """A, fp32 [R, h]"""
    out: torch.Tensor
    """C, fp32 [h, R]"""
    size: float
    """s: root mean square of the coefficients it was trained on."""

    def __call__(self, u_NR: torch.Tensor) -> torch.Tensor:
        return self.size * torch.tanh(u_NR @ self.into / self.size) @ self.out


@dataclass(frozen=True)
class Projection:
    """From the outdated to the upgraded difference of one tensor."""

    basis: torch.Tensor
    """B, fp32 [n, R], orthonormal"""
    inside: torch.Tensor
    """fp32 [R, R]: outdated coefficients times this are upgraded ones."""
    outside: float
    length: float
    network: Network | None = None

    def coefficients(self, x_Nn: torch.Tensor) -> torch.Tensor:
        """[N, R]: what is added along the axes, before `length`."""
        u_NR = x_Nn @ self.basis
        learned = u_NR @ self.inside
        if self.network is not None:
            learned = learned + self.network(u_NR)
        return learned - self.outside * u_NR

    def __call__(self, x_Nn: torch.Tensor) -> torch.Tensor:
        """[N, n]"""
        return self.length * (self.outside * x_Nn + self.coefficients(x_Nn) @ self.basis.T)


class Projected(Changed):
    """Differences of a new task, projected; tensors without a projection stay as they are.

    Args:
        width: of the model's residual stream.
    """

    def __init__(self, inner: Differences, projections: dict[str, Projection], width: int) -> None:
        super().__init__(inner)
        self.projections, self.width = projections, width
        self._coefficients = lru_cache(maxsize=8)(self._of_columns)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32; the first read of a tensor whose columns are the vectors passes over all of it."""
        if name not in self.projections:
            return self.inner.read(name, start, stop)
        project, (height, columns, upright) = self.projections[name], _matrix(self.shape(name), self.width)

        def rows(first: int, last: int) -> torch.Tensor:
            x = self.inner.read(name, first * columns, last * columns).view(last - first, columns)
            if not upright:
                return project(x)
            return project.length * (project.outside * x + project.basis[first:last] @ self._coefficients(name).T)

        return flat_range(rows, columns, start, height * columns if stop is None else stop)

    def _of_columns(self, name: str) -> torch.Tensor:
        vectors = _vectors(self.inner, name, self.width)
        return torch.cat([self.projections[name].coefficients(x) for x in vectors])


@dataclass(frozen=True)
class Sums:
    """What is known of one task's vectors of a tensor: second moments in fp64, along the axes and in all."""

    uu: torch.Tensor
    """[R, R]: of outdated coefficients."""
    uv: torch.Tensor
    """[R, R]: of outdated with upgraded ones."""
    xx: float
    xy: float
    yy: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def factors(self, ridge: float, width: int) -> tuple[torch.Tensor, float]:
        """`inside` [R, R] and `outside` with this ridge."""
        common, axes = _factor(self.xy, self.xx), len(self.uu)
        if math.isinf(ridge) or not axes:
            return common * torch.eye(axes, dtype=torch.float64), common
        weight = ridge * float(self.uu.trace()) / axes
        drawn = weight * torch.eye(axes, dtype=torch.float64)
        inside = torch.linalg.pinv(self.uu + drawn, hermitian=True) @ (self.uv + common * drawn)
        if axes == width:
            return inside, common  # nothing lies outside
        x_left, xy_left = self._left()
        return inside, _factor(xy_left + weight * (width - axes) * common, x_left + weight * (width - axes))

    def square(self, inside: torch.Tensor, outside: float) -> float:
        """Of the predicted vectors."""
        return float((inside * (self.uu @ inside)).sum()) + outside**2 * self._left()[0]

    def error(self, inside: torch.Tensor, outside: float) -> float:
        """Squared, of the predicted vectors, over the square of the upgraded ones."""
        hit = float((inside * self.uv).sum()) + outside * self._left()[1]
        return (self.yy - 2 * hit + self.square(inside, outside)) / self.yy if self.yy > 0 else 0.0

    def _left(self) -> tuple[float, float]:
        """xx and xy of what lies outside of the axes."""
        return max(0.0, self.xx - float(self.uu.trace())), self.xy - float(self.uv.trace())


@dataclass(frozen=True)
class Known:
    """A tensor's axes and each known task's sums."""

    basis: torch.Tensor
    """B, fp64 [n, R]"""
    tasks: list[Sums]

    def left_out(self, ridge: float) -> float:
        """Mean error of each task's vectors as predicted from the others."""
        errors = []
        for i, task in enumerate(self.tasks):
            others = self.tasks[:i] + self.tasks[i + 1 :]
            errors.append(task.error(*_total(others).factors(ridge, len(self.basis))))
        return sum(errors) / len(errors)


def learn(
    pairs: Sequence[Pair],
    names: Sequence[str],
    width: int,
    *,
    rank: int,
    network: bool = False,
    seed: int = 0,
    team: Team = ALONE,
) -> tuple[dict[str, Projection], dict[float, float]]:
    """A projection for each of these tensors, from tasks whose differences are known on both bases.

    A tensor of one pair is in memory at a time; the team shares the tensors out, a collective.

    Args:
        width: of the model's residual stream.
        rank: axes of a tensor at most.
        network: f has a network on top of the ridge regression.

    Returns the projections, and ridge -> mean squared error, over tensors and tasks, of each task as predicted from the
    others, relative to the square of its differences. One task alone leaves nothing to choose by: an infinite ridge.
    """

    def vectors(name: str, pair: Pair) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        old, new = pair
        return zip(_vectors(old, name, width), _vectors(new, name, width), strict=True)

    def blocks(name: str) -> list[Blocks]:
        return [partial(vectors, name, pair) for pair in pairs]

    known = in_threads(lambda name: look(blocks(name), rank), names, label="project", team=team)
    errors = {math.inf: 0.0}
    if len(pairs) > 1:
        errors = {ridge: sum(tensor.left_out(ridge) for tensor in known) / len(known) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)

    def one(task: tuple[str, Known]) -> Projection:
        name, tensor = task
        return settle(tensor, ridge, blocks(name), seed_of(seed, name) if network else None)

    tasks = list(zip(names, known, strict=True))
    return dict(zip(names, in_threads(one, tasks, team=team), strict=True)), errors if len(pairs) > 1 else {}


def look(tasks: Sequence[Blocks], rank: int) -> Known:
    """The axes of all tasks' vectors together, and each task's sums; two passes over the vectors."""
    both = sum(x.T @ x + y.T @ y for blocks in tasks for x, y in _double(blocks))
    energies, axes = torch.linalg.eigh(both)
    basis = axes[:, -rank:].flip(1)
    basis = basis[:, energies[-rank:].flip(0) > 1e-12 * energies[-1]]
    found = []
    for blocks in tasks:
        parts = []
        for x, y in _double(blocks):
            u, v = x @ basis, y @ basis
            parts.append(Sums(u.T @ u, u.T @ v, *(float((a * b).sum()) for a, b in ((x, x), (x, y), (y, y)))))
        found.append(_total(parts))
    return Known(basis, found)


def settle(known: Known, ridge: float, tasks: Sequence[Blocks], seed: int | None) -> Projection:
    """The projection of a tensor with this ridge.

    Args:
        tasks: the vectors that `known` was made from, for the network.
        seed: of the network's first weights; None: no network.
    """
    whole = _total(known.tasks)
    inside, outside = whole.factors(ridge, len(known.basis))
    projection = Projection(known.basis.float(), inside.float(), outside, 1.0)
    squares = whole.square(inside, outside)
    if seed is not None and len(tasks) > 1 and len(inside):
        projection, more = _with_network(projection, tasks, seed)
        squares += more
    length = (whole.yy / squares) ** 0.5 if squares > 0 and whole.yy > 0 else 1.0
    return replace(projection, length=length)


def _double(blocks: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((x.double(), y.double()) for x, y in blocks())


def _total(several: Sequence[Sums]) -> Sums:
    first, *others = several
    return sum(others, first)


def _factor(product: float, square: float) -> float:
    """Least-squares factor of one set of vectors to another, from their product and its own square.

    It stays positive: where two tunings have nothing in common, the outdated direction is still the best guess.
    """
    return max(_LEAST, product / square) if square > 0 else 1.0


def _with_network(projection: Projection, tasks: Sequence[Blocks], seed: int) -> tuple[Projection, float]:
    """A network for what ridge regression leaves, and what it adds to the square of all predicted coefficients.

    It is trained on all tasks but the last, and as long as that helps the last: none remains if nothing does.
    """
    every = -(-sum(len(x) for blocks in tasks for x, _ in blocks()) // _ROWS)
    basis, inside = projection.basis, projection.inside
    rows = [[(x[::every] @ basis, y[::every] @ basis) for x, y in blocks()] for blocks in tasks]
    u, v = (torch.cat([pair[i] for task in rows for pair in task]) for i in (0, 1))
    size = float(u.square().mean().sqrt()) or 1.0
    rest, last = (v - u @ inside) / size, sum(len(pair[0]) for pair in rows[-1])
    draw = torch.Generator().manual_seed(seed)
    into = torch.randn(len(inside), _UNITS, generator=draw) / len(inside) ** 0.5
    out = torch.zeros(_UNITS, len(inside))
    best, lowest = None, float(rest[-last:].square().mean())
    with torch.enable_grad():
        into, out = into.requires_grad_(), out.requires_grad_()
        optimizer = torch.optim.Adam([into, out], lr=_RATE)
        for _ in range(_STEPS):
            wrong = (torch.tanh(u @ into / size) @ out - rest).square()
            if (now := float(wrong[-last:].detach().mean())) < lowest:
                best, lowest = Network(into.detach().clone(), out.detach().clone(), size), now
            optimizer.zero_grad()
            wrong[:-last].mean().backward()
            optimizer.step()
    if best is None:
        return projection, 0.0
    before, after = u @ inside, u @ inside + best(u)
    return replace(projection, network=best), every * float(after.square().sum() - before.square().sum())


def _matrix(shape: tuple[int, ...], width: int) -> tuple[int, int, bool]:
    """A tensor as a matrix: rows, columns, and whether its columns, not its rows, are the vectors.

    Vectors lie along the side that is as wide as the residual stream, or the shorter one; a vector of one dimension is
    many of one number.
    """
    rows, columns = (shape[0], torch.Size(shape[1:]).numel()) if shape else (1, 1)
    upright = columns != width and (rows == width or rows < columns) and len(shape) > 1
    return rows, columns, upright


def _vectors(differences: Differences, name: str, width: int) -> Iterator[torch.Tensor]:
    """The vectors [N, n] of a tensor, fp32, some at a time."""
    rows, columns, upright = _matrix(differences.shape(name), width)
    if upright:
        yield differences.read(name).view(rows, columns).T
        return
    step = max(1, PIECE // (4 * columns))
    for row in range(0, rows, step):
        yield differences.read(name, row * columns, min(rows, row + step) * columns).view(-1, columns)
