"""Tensors put together from stored ones without being made: stacked, joined, cut, turned; read by range.

What a function does with `Planned` tensors is remembered instead of done, as a tree of the classes here. Reading a
range of what comes out reads the ranges of stored tensors that it is made of, and no more than a row beside them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from recyclable.weights.checkpoint_files import Ranged

aten = torch.ops.aten
Shape = tuple[int, ...]


class Plan(ABC):
    """How a tensor comes about."""

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: flat, on the CPU."""


@dataclass(frozen=True)
class Held(Plan):
    """A tensor as it is stored."""

    tensors: Ranged
    name: str

    def read(self, start: int, stop: int) -> torch.Tensor:
        """As the source reads it."""
        return self.tensors.read(self.name, start, stop)


@dataclass(frozen=True)
class Joined(Plan):
    """Tensors one behind the other along a dimension."""

    parts: Sequence[Plan]
    ends: Sequence[int]
    """Where each part ends in a row: all elements of an index of the dimensions before that one."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Row by row, from the parts that have something there."""
        pieces, width = [], self.ends[-1]
        while start < stop:
            row, place = divmod(start, width)
            part = bisect_right(self.ends, place)
            begin = self.ends[part - 1] if part else 0
            size = self.ends[part] - begin
            count = min(stop - start, self.ends[part] - place)
            pieces.append(self.parts[part].read(first := row * size + place - begin, first + count))
            start += count
        return _together(pieces)


@dataclass(frozen=True)
class Cut(Plan):
    """A range of another tensor along a dimension."""

    whole: Plan
    width: int
    """Elements of a row of the whole."""
    begin: int
    """Where the range begins in a row."""
    size: int
    """Elements of a row of the range."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Row by row."""
        pieces = []
        while start < stop:
            row, place = divmod(start, self.size)
            count = min(stop - start, self.size - place)
            pieces.append(self.whole.read(first := row * self.width + self.begin + place, first + count))
            start += count
        return _together(pieces)


@dataclass(frozen=True)
class Turned(Plan):
    """Another tensor with its dimensions in another order."""

    whole: Plan
    shape: Shape
    """Of the whole, without the last dimensions that keep their place."""
    order: Shape
    """Which of them each dimension of the result is."""
    inner: int
    """Elements of the last dimensions that keep their place."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read what is contiguous in the whole: along its last dimension, for every index of those behind it here."""
        sizes = [self.shape[i] for i in self.order]
        place = self.order.index(len(self.shape) - 1)
        behind, count = sizes[place + 1 :], sizes[place]
        row = math.prod(behind) * self.inner
        pieces = []
        while start < stop:
            outer, begin = divmod(start, count * row)
            end = min(stop - outer * count * row, count * row)
            first, last = begin // row, -(-end // row)
            before = _index(outer, sizes[:place])
            runs = [self._run(before, index, first, last) for index in itertools.product(*map(range, behind))]
            block = torch.stack(runs).view(-1, last - first, self.inner).transpose(0, 1).reshape(-1)
            pieces.append(block[begin - first * row : end - first * row])
            start = outer * count * row + end
        return _together(pieces)

    def _run(self, before: Shape, behind: Shape, first: int, last: int) -> torch.Tensor:
        """Elements at [first, last) of the whole's last dimension."""
        index = dict(zip(self.order, (*before, 0, *behind), strict=True))
        flat = 0
        for dimension, size in enumerate(self.shape):
            flat = flat * size + index[dimension]
        return self.whole.read((flat + first) * self.inner, (flat + last) * self.inner)


def _index(flat: int, sizes: Sequence[int]) -> Shape:
    index = []
    for size in reversed(sizes):
        flat, own = divmod(flat, size)
        index.append(own)
    return tuple(reversed(index))


def _together(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Planned(torch.Tensor):
    """A tensor without values that knows how they come about. ValueError for what is done to it beyond rearranging."""

    plan: Plan

    @staticmethod
    def of(plan: Plan, shape: Sequence[int], dtype: torch.dtype) -> Planned:
        """One of this shape."""
        planned = torch.Tensor._make_wrapper_subclass(Planned, tuple(shape), dtype=dtype)
        planned.plan = plan
        return planned

    @staticmethod
    def stored(tensors: Ranged, name: str) -> Planned:
        """A stored one."""
        stored = tensors.stored(name)
        return Planned.of(Held(tensors, name), stored.shape, stored.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func not in _RULES:
            raise ValueError(f"{func} is no rearrangement")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Planned)]
        if len(dtypes := {str(tensor.dtype) for tensor in inputs}) > 1:
            raise ValueError(f"of {' and '.join(sorted(dtypes))} together")
        args, kwargs = tree_map_only(Planned, _twin, (args, kwargs))
        made = func(*args, **kwargs)  # shapes alone: of twins without values
        several = isinstance(made, list | tuple)
        plans = _RULES[func](*args, **kwargs)
        results = [
            Planned.of(plan, twin.shape, inputs[0].dtype)
            for plan, twin in zip(plans, made if several else [made], strict=True)
        ]
        return results if several else results[0]


def _twin(planned: Planned) -> Any:
    """A tensor on the meta device, whose shape may be asked for, with the plan of one that is planned."""
    twin: Any = torch.empty(planned.shape, dtype=planned.dtype, device="meta")
    twin.plan = planned.plan
    return twin


def _same(tensor: Any, *_: Any, **__: Any) -> list[Plan]:
    """Another shape, the same elements in the same order."""
    return [tensor.plan]


def _stack(tensors: Sequence[Any], dim: int = 0) -> list[Plan]:
    dim %= tensors[0].ndim + 1
    size = math.prod(tensors[0].shape[dim:])
    return [Joined([t.plan for t in tensors], [size * (i + 1) for i in range(len(tensors))])]


def _cat(tensors: Sequence[Any], dim: int = 0) -> list[Plan]:
    dim %= tensors[0].ndim
    sizes = [math.prod(t.shape[dim:]) for t in tensors]
    return [Joined([t.plan for t in tensors], list(itertools.accumulate(sizes)))]


def _cuts(tensor: Any, dim: int, sizes: Sequence[int], begin: int = 0) -> list[Plan]:
    """Ranges one behind the other along a dimension, from `begin` on."""
    dim %= tensor.ndim
    inner, width = math.prod(tensor.shape[dim + 1 :]), math.prod(tensor.shape[dim:])
    begins = itertools.accumulate(sizes[:-1], initial=begin)
    return [Cut(tensor.plan, width, b * inner, n * inner) for b, n in zip(begins, sizes, strict=True)]


def _split(tensor: Any, size: int, dim: int = 0) -> list[Plan]:
    length = tensor.shape[dim]
    return _cuts(tensor, dim, [min(size, length - begin) for begin in range(0, length, size)])


def _with_sizes(tensor: Any, sizes: Sequence[int], dim: int = 0) -> list[Plan]:
    return _cuts(tensor, dim, sizes)


def _select(tensor: Any, dim: int, index: int) -> list[Plan]:
    return _cuts(tensor, dim, [1], index % tensor.shape[dim])


def _unbind(tensor: Any, dim: int = 0) -> list[Plan]:
    return _cuts(tensor, dim, [1] * tensor.shape[dim])


def _slice(tensor: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> list[Plan]:
    if step != 1:
        raise ValueError(f"a slice of every {step} is no rearrangement")
    begin, stop, _ = slice(start, end).indices(tensor.shape[dim])
    return _cuts(tensor, dim, [stop - begin], begin)


def _permute(tensor: Any, order: Sequence[int]) -> list[Plan]:
    kept, order = len(order), [i % tensor.ndim for i in order]
    while kept and order[kept - 1] == kept - 1:
        kept -= 1
    if not kept:
        return [tensor.plan]
    return [Turned(tensor.plan, tuple(tensor.shape[:kept]), tuple(order[:kept]), math.prod(tensor.shape[kept:]))]


def _transpose(tensor: Any, first: int, second: int) -> list[Plan]:
    order = list(range(tensor.ndim))
    order[first], order[second] = order[second], order[first]
    return _permute(tensor, order)


_RULES: dict[Any, Callable[..., list[Plan]]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default), _same),
    **dict.fromkeys((aten.clone.default, aten.detach.default, aten.alias.default), _same),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default), _same),
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _with_sizes,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda tensor: _transpose(tensor, 0, -1) if tensor.ndim == 2 else [tensor.plan],
}
