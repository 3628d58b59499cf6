"""Shuffled: the control of `apply`, a random difference of the same norm on the new base."""

from __future__ import annotations

from typing import Literal

from recyclable.methods.parts.starts import StartsShuffled
from recyclable.methods.parts.untrained import TrainsNothing


class Shuffled(TrainsNothing, StartsShuffled):
    """Outdated weights with signs drawn at random, no training: what any difference of that size does."""

    method: Literal["shuffled"] = "shuffled"
