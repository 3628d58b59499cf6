"""Interpolate: the student also imitates the teacher at points of the path from the teacher's weights to its own.

Interpolation distillation of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702): s task + (1 - s) sum
over x of (alpha_x T^2 KL_x + beta_x patient_x). At x the student's weights are (1 - x) teacher + x own; x = 1, the
student itself, is always one of the points.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from recyclable.carrying.changes import Changes
from recyclable.errors import InputError
from recyclable.methods.parts.learning import Distils
from recyclable.methods.parts.starts import StartsOutdated

if TYPE_CHECKING:
    from torch import nn

    from recyclable.carrying.carried import Carried
    from recyclable.methods.parts.scene import Scene
    from recyclable.objectives.objective import Objective


class Interpolate(StartsOutdated, Distils):
    """Outdated or fresh weights, labels and the old model as a teacher along the path to it."""

    method: Literal["interpolate"] = "interpolate"
    start: Literal["fresh", "outdated"] = "outdated"
    """Where the student starts."""
    task_share: float = Field(0.3, ge=0, le=1)
    """s: share of the labels' loss."""
    interpolation_points: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(None, min_length=1)
    """The x below 1; null: 0.25, 0.5, 0.75, or draws."""
    interpolation_draws: int | None = Field(None, gt=0)
    """So many x drawn anew at every step, r + (1 - 2r) U(0, 1), in place of fixed ones."""
    interpolation_margin: float = Field(0.0, ge=0, lt=0.5)
    """r: drawn x keep this distance from 0 and 1."""
    alpha_by_point: list[Annotated[float, Field(ge=0)]] | None = None
    """alpha_x in the order of x (drawn ones ascending), x = 1 last; null: alpha at each."""
    beta_by_point: list[Annotated[float, Field(ge=0)]] | None = None
    """beta_x in the same order; null: beta at each."""
    second_weights: str | None = None
    """Other adapted weights for the same labels: a second fixed model, and a second path with the same points."""
    second_base: str | None = None
    """The base that second_weights belong to."""

    @model_validator(mode="after")
    def _path(self) -> Interpolate:
        if self.interpolation_points and self.interpolation_draws:
            raise ValueError("interpolation_points and interpolation_draws are both given, expected one of them")
        if (self.second_weights is None) != (self.second_base is None):
            raise ValueError("second_weights and second_base go together, found one of them")
        for name in ("alpha_by_point", "beta_by_point"):
            given, points = getattr(self, name), (self.interpolation_draws or len(self.points())) + 1
            if given is not None and len(given) != points:
                raise ValueError(f"{name}: {len(given)} values, expected {points}: one per point and one for x = 1")
            if given is not None:
                self.require_unset((name.partition("_")[0],), f"with {name}")
        if not self.interpolation_draws:
            self.require_unset(("interpolation_margin",), "without interpolation_draws")
        if self.start == "fresh":
            self.require_unset(Changes.model_fields, "with start: fresh")
        return self

    def points(self) -> tuple[float, ...]:
        """The fixed x below 1; none where they are drawn."""
        return () if self.interpolation_draws else tuple(self.interpolation_points or (0.25, 0.5, 0.75))

    def require(self, scene: Scene) -> None:
        """A straight path must lead from the teacher's weights, and from the second model's."""
        super().require(scene)
        scene.carried.require_same_shapes()
        if self.second_weights is not None:
            second = self._second(scene)
            scene.data.train.readable_by(second.new.config, second.reader.prompts)
            second.verify()
        if not scene.head and not any(self.beta_by_point or [self.beta]):
            raise InputError("beta", "is 0, but of a teacher with other labels only hidden states are learned from")

    def student(self, scene: Scene) -> nn.Module:
        """Where `start` says."""
        from recyclable.models.tasks import fresh_model

        if self.start == "fresh":
            return fresh_model(scene.carried, scene.task, self.seed, self.rate())
        return super().student(scene)

    def told(self, scene: Scene) -> dict[str, object]:
        """As of any start."""
        return {} if self.start == "fresh" else super().told(scene)

    def objective(self, student: nn.Module, scene: Scene) -> Objective:
        """Labels, and the teacher at every point of the path."""
        from recyclable.carrying.places import label_heads
        from recyclable.objectives.interpolation import Places
        from recyclable.objectives.of_task import interpolated_objective

        places = Places(self.points(), self.interpolation_draws or 0, self.interpolation_margin, self.seed)
        return interpolated_objective(
            student,
            scene.kind,
            self.teaching(scene),
            places=places,
            share=self.task_share,
            alphas=self.alpha_by_point or [self.alpha] * (len(places) + 1),
            betas=self.beta_by_point or [self.beta] * (len(places) + 1),
            second=scene.teacher(self.seed, partial(self._second, scene)) if self.second_weights else None,
            left_out=() if scene.head else label_heads(student).values(),
            temperature=self.temperature,
            reduction=self.kd_reduction,
            same_labels=scene.head,
            logits=self.logits,
        )

    def _second(self, scene: Scene) -> Carried:
        """The second fixed model's weights on their own base, which must be of the first one's kind."""
        from recyclable.carrying.carried import Carried, require_same_shapes
        from recyclable.carrying.labels import require_same_rows
        from recyclable.tasks.parts.task import task_of
        from recyclable.weights.adapted import require_same_model, require_same_tuning

        assert self.second_weights is not None and self.second_base is not None, "they go together"
        first = scene.carried
        second = Carried.open(self.second_weights, self.second_base, self.second_base, store=self.store)
        require_same_tuning(second.weights, first.weights)
        require_same_model(second.weights, first.weights)
        require_same_rows(second.weights, task_of(first.weights.manifest.task))
        require_same_shapes(second.new, first.old)
        return second
