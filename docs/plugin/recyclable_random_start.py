"""A control for every table of gains: as `init`, but with random differences of the old ones' norms.

What starting from outdated weights gains over starting from these is what the weights know, not how large they are.
"""

from typing import Literal

import torch

from recyclable.methods.parts.learning import LearnsFromLabels
from recyclable.methods.parts.starts import StartsOutdated
from recyclable.weights.differences import Changed, Differences
from recyclable.weights.sources import drawn


class Random(Changed):
    """Each tensor drawn from a seed and its name, as long as the inner one."""

    def __init__(self, inner: Differences, seed: int) -> None:
        super().__init__(inner)
        self.seed, self._rms = seed, {name: float(inner.read(name).square().mean().sqrt()) for name in inner.names}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = torch.Size(self.shape(name)).numel() if stop is None else stop
        return drawn(self.seed, name, (torch.Size(self.shape(name)).numel(), 1), self._rms[name])(start, stop)


class RandomStart(StartsOutdated, LearnsFromLabels):
    """Random differences of the old ones' norms, the old head, labels."""

    method: Literal["random_start"] = "random_start"

    def differences(self, scene):
        """What is added to the new base."""
        return Random(super().differences(scene), self.seed)
