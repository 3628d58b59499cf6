"""Shuffled init: the control of `init`, training that starts from a random difference of the same norm."""

from __future__ import annotations

from typing import Literal

from recyclable.methods.parts.learning import LearnsFromLabels
from recyclable.methods.parts.starts import StartsShuffled


class ShuffledInit(StartsShuffled, LearnsFromLabels):
    """Outdated weights with signs drawn at random, labels: what any start that far away gives."""

    method: Literal["shuffled_init"] = "shuffled_init"
