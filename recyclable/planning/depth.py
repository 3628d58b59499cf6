"""The trace of a deep model from that of the same model with four layers: what one layer does, the others do.

Exact where layers are alike but for the last, which may compute some tokens alone: the part of the trace that belongs
to the second layer, which stands between two like others, is repeated, forward and backward.
Of what has no backward pass, a teacher, what its layers leave is taken to stay: too much rather than too little.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from recyclable.planning.trace import Trace, Use

LAYERS = 4
"""Of the model that is traced: a first, two alike, and a last one."""
_LAYER = re.compile(r"\.(\d+)\.")


class _Part(NamedTuple):
    """The second layer's moments, in one direction."""

    start: int
    stop: int
    stack: str
    backward: bool


def deepen(traced: Trace, layer_flops: int, layers: int) -> Trace | None:
    """The trace with `layers` layers instead of four; None where it does not show which moments are the second one's.

    Args:
        traced: of a model all of whose stacks have four layers.
        layer_flops: of a layer of each stack, which cannot be told from moments.
    """
    times, parts = layers - LAYERS, _parts(traced)
    if not parts or not _disjoint(parts):
        return None
    if (np.sum([_change(traced, part)[:-1] for part in parts], axis=0) < 0).any():
        return None  # it gives back what other layers left, which cannot be repeated
    state = _repeated(traced, parts, times)
    behind = {number: number + times for number in range(2, LAYERS)}

    def moved(moment: int, again: int = 0) -> int:
        """Where a moment is now; in a repeated part, in that repetition."""
        part = next((p for p in parts if p.start <= moment < p.stop), None)
        shift = sum(times * (p.stop - p.start) for p in parts if p.stop <= moment)
        return moment + shift + (0 if part is None else again * (part.stop - part.start))

    def copies(moment: int, names: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
        part = next((p for p in parts if p.start <= moment < p.stop), None)
        if part is None:
            return [(moved(moment), tuple(_renamed(name, behind) for name in names))]
        order = range(1, 2 + times)[:: -1 if part.backward else 1]
        return [
            (moved(moment, again), tuple(_renamed(name, {1: layer}) for name in names))
            for again, layer in enumerate(order)
        ]

    uses = [Use(*each) for use in traced.uses for each in copies(use.moment, use.parameters)]
    done = [(name, moment) for one, at in traced.order for moment, (name,) in copies(at, (one,))]
    forward = traced.forward + sum(times * (p.stop - p.start) for p in parts if not p.backward)
    return replace(
        traced,
        held=state[:, :-1],
        done=state[:, -1],
        forward=forward,
        order=tuple(sorted(done, key=lambda each: each[1])),
        uses=tuple(sorted(uses, key=lambda use: use.moment)),
        flops=traced.flops + times * layer_flops,
    )


def _parts(traced: Trace) -> list[_Part]:
    """The second layers' moments, of each stack of layers; none where any is not to be seen."""
    found: dict[tuple[str, bool], dict[int, int]] = {}
    for moment, names in traced.uses:
        for name in names:
            for match in _LAYER.finditer(name):
                firsts = found.setdefault((name[: match.start()], moment >= traced.forward), {})
                firsts.setdefault(int(match[1]), moment)
                break
    parts = []
    for (stack, backward), firsts in found.items():
        if sorted(firsts) != list(range(LAYERS)):
            return []
        start, stop = (firsts[1], firsts[0]) if backward else (firsts[1], firsts[2])
        if not start < stop:
            return []
        parts.append(_Part(start, stop, stack, backward))
    return sorted(parts)


def _disjoint(parts: list[_Part]) -> bool:
    return all(one.stop <= other.start for one, other in itertools.pairwise(parts))


def _change(traced: Trace, part: _Part) -> np.ndarray:
    """What a part adds to the bytes held, and done."""
    state = np.concatenate([traced.held, traced.done[:, None]], axis=1)
    return state[part.stop - 1] - (state[part.start - 1] if part.start else 0)


def _repeated(traced: Trace, parts: list[_Part], times: int) -> np.ndarray:
    """Bytes held, and done, at each moment, the parts repeated so many times more."""
    state = np.concatenate([traced.held, traced.done[:, None]], axis=1)
    pieces, more, at = [], np.zeros_like(state[0]), 0
    for part in parts:
        pieces.append(state[at : part.start] + more)
        change = _change(traced, part)
        for again in range(times + 1):
            pieces.append(state[part.start : part.stop] + more + again * change)
        more, at = more + times * change, part.stop
    return np.concatenate([*pieces, state[at:] + more])


def layers_alike(shapes: dict[str, tuple[int, ...]]) -> int | None:
    """How many layers every stack has, by the shapes of all parameters; None where stacks or layers differ.

    The first may have what others lack (T5's positions, a dense layer before experts): it is one of those looked at.
    """
    stacks: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        if match := _LAYER.search(name):
            layers = stacks.setdefault(name[: match.start()], {})
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = shape
    counts = {len(layers) for layers in stacks.values()}
    later = ([str(each) for number, each in layers.items() if number] for layers in stacks.values())
    if len(counts) != 1 or any(len(set(each)) > 1 for each in later):
        return None
    return counts.pop()


def _renamed(name: str, numbers: dict[int, int]) -> str:
    """A parameter's name with another number of its layer, the first number in it."""
    match = _LAYER.search(name)
    if match is None or int(match[1]) not in numbers:
        return name
    return f"{name[: match.start()]}.{numbers[int(match[1])]}.{name[match.end() :]}"
