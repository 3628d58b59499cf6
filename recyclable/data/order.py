"""Which examples make up which step: a function of seed and step alone, so resuming and sharding change nothing."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np

_WINDOW = 50  # steps; as in transformers' LengthGroupedSampler, enough for nearly equal lengths
Item = tuple[int, int]
"""(epoch, index of the example): together they decide everything random about one use of an example."""


class Steps(Protocol):
    """Which examples make up which step."""

    def step(self, step: int) -> list[Item]:
        """The examples of one global batch, in order."""
        ...


class Order:
    """An endless stream of examples, each epoch shuffled anew, cut into steps; no example is dropped at a seam.

    Args:
        lengths: tokens of each example; texts of like length then share a step, which leaves little to pad. Steps are
            made from windows of `_WINDOW` steps (at most an epoch): sorted by length, cut, the cuts shuffled.
    """

    def __init__(self, examples: int, batch: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self._examples, self._batch, self._seed, self._lengths = examples, batch, seed, lengths
        self._steps = max(1, min(_WINDOW, examples // batch))
        self._permutation = lru_cache(maxsize=4)(self._shuffle)
        self._window = lru_cache(maxsize=1)(self._group)

    def step(self, step: int) -> list[Item]:
        """The examples of one global batch, in order."""
        if self._lengths is None:
            return self.stream(step * self._batch, self._batch)
        window, place = divmod(step, self._steps)
        return self._window(window)[place]

    def used(self, steps: int) -> list[int]:
        """Indices of the examples that the first `steps` steps use, ascending."""
        found: set[int] = set()
        for step in range(steps):
            found.update(index for _, index in self.step(step))
            if len(found) == self._examples:
                break
        return sorted(found)

    def stream(self, start: int, count: int) -> list[Item]:
        """`count` examples of the stream, from its `start`-th on, whatever their lengths."""
        pairs = (divmod(position, self._examples) for position in range(start, start + count))
        return [(epoch, int(self._permutation(epoch)[place])) for epoch, place in pairs]

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._examples)

    def _group(self, window: int) -> list[list[Item]]:
        lengths, size = self._lengths, self._steps * self._batch
        assert lengths is not None, "only texts of known lengths are grouped"
        items = sorted(self.stream(window * size, size), key=lambda item: lengths[item[1]])
        order = np.random.default_rng((self._seed, window, 1)).permutation(self._steps)
        return [items[place * self._batch : (place + 1) * self._batch] for place in order]


class Replaying:
    """Steps of new examples with a share of old ones, each a stream of its own; old ones are numbered after the new.

    After n steps floor(n batch share) examples were old: the share is exact however small the batch. Where in a step
    they stand is drawn, so that no rank gets more of them than another for long.
    """

    def __init__(self, new: int, old: int, share: float, batch: int, seed: int) -> None:
        self._new, self._old = Order(new, batch, seed), Order(old, batch, seed)
        self._first_old, self._batch, self._seed = new, batch, seed
        self._share = Fraction(str(share))

    def step(self, step: int) -> list[Item]:
        """The examples of one global batch, in order."""
        before, after = (int(n * self._batch * self._share) for n in (step, step + 1))
        old = [(epoch, self._first_old + index) for epoch, index in self._old.stream(before, after - before)]
        new = self._new.stream(step * self._batch - before, self._batch - len(old))
        items = [*new, *old]
        return [items[place] for place in np.random.default_rng((self._seed, step, 2)).permutation(len(items))]


def share_of_step(items: list[Item], rank: int, world_size: int, micro_batch: int) -> list[list[Item]]:
    """One rank's micro-batches of a step, one per accumulation step; all ranks' shares together are `items`."""
    stride = world_size * micro_batch
    starts = range(rank * micro_batch, len(items), stride)
    return [items[start : start + micro_batch] for start in starts]
