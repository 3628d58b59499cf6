"""Which examples make up which step: a function of seed and step alone, so resuming and sharding change nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Item = tuple[int, int]
"""(epoch, index of the example): together they decide everything random about one use of an example."""


class Order:
    """An endless stream of examples, each epoch shuffled anew, cut into steps; no example is dropped at a seam."""

    def __init__(self, examples: int, batch: int, seed: int) -> None:
        self._examples, self._batch, self._seed = examples, batch, seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._examples)

    def step(self, step: int) -> list[Item]:
        """The examples of one global batch, in order."""
        positions = range(step * self._batch, (step + 1) * self._batch)
        pairs = (divmod(position, self._examples) for position in positions)
        return [(epoch, int(self._permutation(epoch)[place])) for epoch, place in pairs]


def share_of_step(items: list[Item], rank: int, world_size: int, micro_batch: int) -> list[list[Item]]:
    """One rank's micro-batches of a step, one per accumulation step; all ranks' shares together are `items`."""
    stride = world_size * micro_batch
    starts = range(rank * micro_batch, len(items), stride)
    return [items[start : start + micro_batch] for start in starts]
