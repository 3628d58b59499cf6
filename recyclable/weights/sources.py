"""Where the values of a model's parameters come from, and how they get there: by range, each where it is needed.

A model is built without values first; each parameter knows how to read any range of them. Whoever holds the parameter
(whole, or as one rank's partition) reads its own elements straight into place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import nn

from recyclable.weights.digest import element_ranges, in_threads

Read = Callable[[int, int], torch.Tensor]
"""(start, stop) -> elements [start, stop) of the flattened values: a flat floating-point CPU tensor."""
_DRAWN_TOGETHER = 1 << 20
M = TypeVar("M", bound=nn.Module)


class Unread(nn.Parameter):
    """A parameter without values (on the meta device) that knows where they come from.

    Args:
        read: gives elements of the flattened tensor.
    """

    read: Read

    def __new__(cls, shape: Sequence[int], read: Read, requires_grad: bool = True) -> Unread:
        parameter = super().__new__(cls, torch.empty(tuple(shape), device="meta"), requires_grad)
        parameter.read = read
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Unread:
        if id(self) not in memo:
            memo[id(self)] = Unread(self.shape, self.read, self.requires_grad)
        return memo[id(self)]


def set_source(parameter: nn.Parameter, read: Read) -> None:
    """Make a parameter an unread one, in place: whatever refers to it goes on doing so."""
    become(parameter, Unread(parameter.shape, read, parameter.requires_grad))


def become(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Turn a parameter into another one, in place; the other becomes what the parameter was."""
    torch.utils.swap_tensors(parameter, other)


def is_unread(module: nn.Module) -> bool:
    """Whether any parameter still lacks its values."""
    return any(isinstance(parameter, Unread) for parameter in module.parameters())


def fill(module: M, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> M:
    """Read every unread parameter whole, straight into its storage, tied ones once; returns the module."""
    targets = []
    for parameter in module.parameters():
        if isinstance(parameter, Unread):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            targets.append((values.view(-1), parameter.read, 0))
            become(parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))
    read_into(targets)
    return module


def read_into(targets: Iterable[tuple[torch.Tensor, Read, int]]) -> None:
    """Fill flat tensors with values from element `start` on, a few pieces of a few MiB at a time.

    Args:
        targets: (flat tensor of any dtype and device, where its values come from, start).
    """
    tasks = [
        (flat[begin - start : end - start], read, begin, end)
        for flat, read, start in targets
        for begin, end in element_ranges(start, start + flat.numel())
    ]

    def copy(task: tuple[torch.Tensor, Read, int, int]) -> None:
        piece, read, begin, end = task
        piece.copy_(read(begin, end))

    with torch.no_grad():
        in_threads(copy, tasks)


def held(values: torch.Tensor) -> Read:
    """Values that are in memory already."""
    flat = values.detach().reshape(-1)
    return lambda start, stop: flat[start:stop]


def drawn(seed: int, name: str, shape: Sequence[int], std: float) -> Read:
    """Fresh values as BERT draws them: N(0, std), biases 0, norms 1; from seed and name alone."""
    if len(shape) == 1:
        return partial(_constant, 0.0 if name.endswith("bias") else 1.0)
    return partial(_normal, seed_of(seed, name), torch.Size(shape).numel(), std)


def seed_of(seed: int, name: str) -> int:
    """A seed for whatever bears this name, 56 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _constant(value: float, start: int, stop: int) -> torch.Tensor:
    return torch.full((stop - start,), value)


def _normal(seed: int, numel: int, std: float, start: int, stop: int) -> torch.Tensor:
    """The elements that `torch.empty(numel).normal_(0, std)` would have there, drawn in pieces up to `stop`.

    Torch draws one element after the other, then the last 16 of a tensor whose size is no multiple of 16 anew: so no
    piece but the last may have such a size, and the last one has 16 elements at least.
    """
    generator, known, result = torch.Generator(), _states(seed, numel), torch.empty(stop - start)
    begin = start // _DRAWN_TOGETHER * _DRAWN_TOGETHER
    while begin not in known:
        begin -= _DRAWN_TOGETHER
    generator.set_state(known[begin])
    while begin < stop:
        end = numel if numel - begin < _DRAWN_TOGETHER + 16 else begin + _DRAWN_TOGETHER
        piece = torch.empty(end - begin).normal_(0.0, std, generator=generator)
        first, last = max(begin, start), min(end, stop)
        if first < last:
            result[first - start : last - start] = piece[first - begin : last - begin]
        if end < numel:
            known[end] = generator.get_state()
        begin = end
    return result


@lru_cache(maxsize=8)
def _states(seed: int, numel: int) -> dict[int, torch.Tensor]:
    """Element -> the state before it is drawn, of a tensor of so many: a large one is not drawn anew for each piece."""
    return {0: torch.Generator().manual_seed(seed).get_state()}
