"""Pieces of a run's state: elements of a parameter by name and range, and what the optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from recyclable.weights.checkpoint_files import Ranged

WEIGHT = "weight"
"""Kind of piece: a parameter's values as the optimizer has them, its fp32 copy where training is in half precision."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of piece: AdamW's states, as torch calls them."""


@dataclass(frozen=True)
class Piece:
    """Some elements of a parameter, and what the optimizer keeps of them."""

    name: str
    start: int
    """The first of them in the flattened parameter."""
    tensors: Mapping[str, torch.Tensor]
    """Kind -> [elements] on the CPU; moments are there once the optimizer has made a step."""
    steps: float
    """That it has made."""


class Kept(Protocol):
    """Pieces together, to be read by range."""

    def kind(self, kind: str) -> Ranged:
        """All parameters' pieces of a kind."""

    def steps(self, name: str) -> float:
        """The optimizer's steps with a parameter."""
