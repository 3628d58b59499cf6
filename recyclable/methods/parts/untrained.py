"""What methods that train nothing share: differences that are added as they are, or at a strength that is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from recyclable.carrying.changes import FoundChanges
from recyclable.methods.parts.starts import StartsOutdated

if TYPE_CHECKING:
    from torch import nn

    from recyclable.methods.parts.scene import Scene
    from recyclable.weights.differences import Differences


class TrainsNothing(FoundChanges, StartsOutdated):
    """Outdated weights on the new base, untrained."""

    strength_examples: int = Field(128, gt=0)
    """Labelled dev examples, at most, on which a strength is found; the training examples are what the outdated weights
    were tuned on."""

    def strength(self) -> Literal["none", "common", "by_layer"]:
        """Which strengths are found on labelled examples, by forward passes."""
        return "by_layer" if self.scale == "auto" else "none"

    def mapped(self, student: nn.Module, scene: Scene) -> tuple[Differences, dict[str, Any]]:
        """What is added to the new base, and what the manifest says of how it came about; a collective.

        Args:
            student: a fresh model of the new base.
        """
        return self.differences(scene), {}

    def verify(self, scene: Scene) -> None:
        """After the reading: InputError where anything else the method read is not what it claims; a collective."""
