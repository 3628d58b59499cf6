"""Where the weights start: fresh, outdated, or at random as far away as outdated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from recyclable.carrying.changes import Changes
from recyclable.methods.parts.method import Method

if TYPE_CHECKING:
    from torch import nn

    from recyclable.methods.parts.scene import Scene
    from recyclable.weights.differences import Differences


class StartsFresh(Method):
    """The new base; head and adapter drawn from the seed."""

    def student(self, scene: Scene) -> nn.Module:
        """A fresh model of the very kind that the outdated weights are."""
        from recyclable.models.tasks import fresh_model

        return fresh_model(scene.carried, scene.task, self.seed, self.rate())


class StartsOutdated(Method, Changes):
    """The new base + outdated differences, or the old adapter; the old head.

    Initialization-based recycling (arXiv 2305.08702, section 5.1).
    """

    @model_validator(mode="after")
    def _aligns_unrelated(self) -> StartsOutdated:
        if self.align is not None and not self.allow_unrelated:
            raise ValueError(f"align is {self.align}, which is for unrelated bases: give allow_unrelated as well")
        return self

    def differences(self, scene: Scene) -> Differences:
        """What is added to the new base."""
        from recyclable.carrying.putting import differences_of

        return differences_of(scene.carried, self, self.seed)

    def student(self, scene: Scene) -> nn.Module:
        """The new base with the differences on it."""
        from recyclable.carrying.putting import put
        from recyclable.models.tasks import fresh_model

        model = fresh_model(scene.carried, scene.task, self.seed, self.rate())
        put(model, scene.carried, self.differences(scene), scene.head)
        return model

    def told(self, scene: Scene) -> dict[str, Any]:
        """Tokens that came and went between the bases, where any did; said on standard output too."""
        from recyclable import distributed

        if (rows := scene.carried.moved_rows()) is None:
            return {}
        distributed.say(f"notice: {scene.carried.weights.folder}: {rows}")
        return {"vocabulary": rows.as_dict()}


class StartsShuffled(StartsOutdated):
    """The same with signs of differences drawn at random from the seed: a control of the same norm in every tensor.

    A gain that it makes too is none of the outdated weights'. What the base lacks (the head) stays the old one.
    """

    def require(self, scene: Scene) -> None:
        """The weights must be a delta, a LoRA or a bottleneck adapter: others have no tensors of either sign."""
        super().require(scene)
        self.differences(scene)

    def differences(self, scene: Scene) -> Differences:
        """Of an adapter both factors are drawn: a random LoRA of equal norm."""
        from recyclable.carrying.scaling import Strength
        from recyclable.weights.differences import RandomSigns

        differences = super().differences(scene)
        return RandomSigns(differences, Strength(scene.carried, differences).parts, self.seed)
