"""What is done to differences before they are added: sum, prune, drop, scale, align, permute, control; composed lazily.

Everything here, like `weights.delta.Delta`, answers for any range of elements without holding a whole tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Protocol

import numpy as np
import torch

from recyclable.errors import InputError
from recyclable.weights import algebra
from recyclable.weights.digest import PIECE, element_pieces


class Differences(Protocol):
    """Tensor of a base -> its fp32 difference, by range of the flattened tensor."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...


class Changed:
    """Differences made from others; names and shapes stay."""

    def __init__(self, inner: Differences) -> None:
        self.inner = inner

    @property
    def names(self) -> list[str]:
        """The inner ones'."""
        return self.inner.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The inner ones'."""
        return self.inner.shape(name)


class Total(Changed):
    """The sum of several."""

    def __init__(self, several: Sequence[Differences]) -> None:
        super().__init__(several[0])
        self.several = several

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        return algebra.weighted([each.read(name, start, stop) for each in self.several], [1.0] * len(self.several))


class Ties(Total):
    """TIES (arXiv 2306.01708) with the `density` largest share of each tensor kept; for one alone it is pruning."""

    def __init__(self, several: Sequence[Differences], density: float) -> None:
        super().__init__(several)
        self.density = density
        self._thresholds: dict[str, list[float]] = {}
        self._finding: defaultdict[str, Lock] = defaultdict(Lock)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32; the first read of a tensor passes over all of it to find the threshold."""
        with self._finding[name]:  # threads that read one tensor's pieces wait for the one that is at it
            if name not in self._thresholds:
                pieces = element_pieces({name: self.shape(name)})

                def values(of: Differences) -> Iterator[torch.Tensor]:
                    return (of.read(*piece) for piece in pieces)

                self._thresholds[name] = [
                    algebra.magnitude_threshold(partial(values, each), self.density) for each in self.several
                ]
        return algebra.ties([each.read(name, start, stop) for each in self.several], self._thresholds[name])


class Dare(Changed):
    """DARE (arXiv 2311.03099): elements dropped at random, the others made up for it."""

    def __init__(self, inner: Differences, rate: float, seed: int) -> None:
        super().__init__(inner)
        self.rate, self.seed = rate, seed

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        return algebra.dare(self.inner.read(name, start, stop), self.rate, self.seed, name, start)


class RandomSigns(Changed):
    """Some tensors with signs drawn at random: a control, as large as the differences and of no meaning.

    Args:
        chosen: the tensors; the others stay as they are.
    """

    def __init__(self, inner: Differences, chosen: Collection[str], seed: int) -> None:
        super().__init__(inner)
        self.chosen, self.seed = frozenset(chosen), seed

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        values = self.inner.read(name, start, stop)
        return algebra.random_signs(values, self.seed, name, start) if name in self.chosen else values


class Scaled(Changed):
    """Each tensor times a strength of its own; at 0 it is not read.

    Args:
        scales: tensor -> strength; tensors that are not named stay as they are.
    """

    def __init__(self, inner: Differences, scales: Mapping[str, float]) -> None:
        super().__init__(inner)
        self.scales = scales

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        scale = self.scales.get(name, 1.0)
        if scale == 0:
            stop = torch.Size(self.shape(name)).numel() if stop is None else stop
            return torch.zeros(stop - start)
        return self.inner.read(name, start, stop) * scale


class Aligned(Changed):
    """Rows of embeddings and LM heads moved to where the new vocabulary has their tokens; new tokens' rows are zero.

    Args:
        names: tensors whose first dimension is the vocabulary.
        rows: int64 [new rows], for each the row of the same token in the old vocabulary, or -1.
        by_column: matrices whose columns are the vocabulary.
    """

    def __init__(
        self, inner: Differences, names: frozenset[str], rows: np.ndarray, by_column: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(inner)
        self.aligned, self.rows, self.by_column = names, rows, by_column

    def shape(self, name: str) -> tuple[int, ...]:
        """With the new vocabulary's rows."""
        shape = self.inner.shape(name)
        if name in self.by_column:
            return (*shape[:-1], len(self.rows))
        return (len(self.rows), *shape[1:]) if name in self.aligned else shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        if name in self.by_column:
            return _from_columns(self.inner, name, self.rows, start, stop)
        if name not in self.aligned:
            return self.inner.read(name, start, stop)
        return _from_rows(self.inner, name, self.rows, start, stop)


class Permuted(Changed):
    """Rows or columns of some tensors in another order.

    Args:
        rows, columns: tensor -> int64, for each row (column) here the one there.
    """

    def __init__(self, inner: Differences, rows: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> None:
        super().__init__(inner)
        self.rows, self.columns = rows, columns

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        if name in self.rows:
            return _from_rows(self.inner, name, self.rows[name], start, stop)
        if name not in self.columns:
            return self.inner.read(name, start, stop)
        return _from_columns(self.inner, name, self.columns[name], start, stop)


def _from_columns(inner: Differences, name: str, columns: np.ndarray, start: int, stop: int | None) -> torch.Tensor:
    """Elements [start, stop) of the matrix whose columns are these columns of the inner one; column -1 is zeros."""
    height, width = inner.shape(name)
    order, none = torch.from_numpy(columns), torch.from_numpy(columns < 0)

    def rows(first: int, last: int) -> torch.Tensor:
        moved = inner.read(name, first * width, last * width).view(-1, width)[:, order]
        return moved.masked_fill_(none, 0)

    return algebra.flat_range(rows, len(columns), start, height * len(columns) if stop is None else stop)


def _from_rows(inner: Differences, name: str, rows: np.ndarray, start: int, stop: int | None) -> torch.Tensor:
    """Elements [start, stop) of the tensor whose rows are these rows of the inner one; row -1 is zeros."""
    width = torch.Size(inner.shape(name)[1:]).numel()

    def moved(first: int, last: int) -> torch.Tensor:
        result = torch.zeros(last - first, width)
        for at, old, count in _runs(rows[first:last]):
            for some in range(0, count, step := max(1, PIECE // (4 * width))):
                end = min(some + step, count)
                part = inner.read(name, (old + some) * width, (old + end) * width)
                result[at + some : at + end] = part.view(-1, width)
        return result

    return algebra.flat_range(moved, width, start, len(rows) * width if stop is None else stop)


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(position, old row, length) of each stretch of rows that lie one behind the other in the old tensor."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1 if len(rows) else np.empty(0, int)
    for at, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        if end > at and rows[at] >= 0:
            yield int(at), int(rows[at]), int(end - at)


def require_alike(several: Sequence[Differences], where: Sequence[object]) -> None:
    """InputError when differences that are to be summed are of other tensors or shapes than the first's."""
    for each, place in zip(several, where, strict=True):
        if each.names != several[0].names:
            other = sorted(set(each.names) ^ set(several[0].names))
            raise InputError(place, f"cannot be summed with {where[0]}: {other[0]} is in only one of them")
        for name in each.names:
            if each.shape(name) != several[0].shape(name):
                raise InputError(place, f"{name} is {each.shape(name)}, in {where[0]} {several[0].shape(name)}")
