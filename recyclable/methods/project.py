"""Project: outdated weights mapped as other tasks' weights, known on both bases, show (`analysis.projection`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from recyclable.methods.parts.untrained import TrainsNothing

if TYPE_CHECKING:
    from torch import nn

    from recyclable.carrying.projecting import KnownTask
    from recyclable.methods.parts.scene import Scene
    from recyclable.weights.differences import Differences


class Project(TrainsNothing):
    """Outdated weights, mapped by a projection learned on other tasks; no training."""

    wants_other_tasks: ClassVar[bool] = True

    method: Literal["project"] = "project"
    project_from: list[tuple[str, str]] = Field(min_length=1)
    """[weights on the old base, weights of the same task on the new base] of each task that is known on both."""
    project_rank: int = Field(32, gt=0)
    """Axes of each tensor's projection."""
    project_with: Literal["linear", "network"] = "linear"
    """How coefficients along the axes are mapped: ridge regression, or a small network on top of it."""
    _opened: list[Any] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _finds_strength(self) -> Project:
        if self.known_scale() != 1.0:
            raise ValueError(f"scale is {self.scale}, but method project finds its strength itself")
        return self

    def strength(self) -> Literal["none", "common", "by_layer"]:
        """One for all, or one for each layer group where scale is auto."""
        return "by_layer" if self.scale == "auto" else "common"

    def require(self, scene: Scene) -> None:
        """The known tasks' weights must be of these bases and of this tuning."""
        super().require(scene)
        self._known(scene)

    def mapped(self, student: nn.Module, scene: Scene) -> tuple[Differences, dict[str, Any]]:
        """The differences, projected."""
        from recyclable.carrying.projecting import projected

        known, width = self._known(scene), scene.carried.new.config.hidden_size
        network = self.project_with == "network"
        differences, errors = projected(
            known, student, scene.carried, self.differences(scene), width, self.project_rank, network, self.seed
        )
        told = {
            "with": self.project_with,
            "rank": self.project_rank,
            "learned_from": [one.described() for one in known],
        }
        by_ridge = {str(ridge): error for ridge, error in errors.items()}
        return differences, {"projection": {**told, "left_out_error_by_ridge": by_ridge}}

    def verify(self, scene: Scene) -> None:
        """The known tasks' weights too."""
        from recyclable import distributed

        for one in self._known(scene):
            one.verify(distributed.Ranks())

    def _known(self, scene: Scene) -> list[KnownTask]:
        """The known tasks, opened once: what is read of them is hashed on the way."""
        from recyclable.carrying.projecting import open_known

        if self._opened is None:
            self._opened = open_known(self.project_from, self.store, scene.carried, scene.task.name)
        return self._opened
