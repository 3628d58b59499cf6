"""What happens to outdated differences before they are added to a new base: settings of `apply` and of recycle.yaml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from recyclable.config.settings import Settings


class Changes(Settings):
    """How differences are added: as they are, or changed first."""

    scale: float = 1.0
    """Strength: new base + scale x difference, also where an adapter is what makes it."""
    ties: float | None = Field(None, gt=0, le=1)
    """TIES: the share of each tensor's elements, the largest, that is kept; several weights are merged by sign."""
    dare: float | None = Field(None, ge=0, lt=1)
    """DARE: the share of elements that is dropped at random, from `seed`."""
    skip_embeddings: bool = False
    """Leave the new base's token embeddings (and untied LM head) as they are."""
    align: Literal["permutation"] | None = None
    """permutation: where the bases are not related, put each neuron's and head's difference where the new base has the
    one that is most like it; only together with allow_unrelated."""

    def known_scale(self) -> float:
        """The scale, 1 where it is still to be found."""
        return self.scale

    def changes_start(self) -> bool:
        """Whether differences are added in any other way than as they are, as far as that is known."""
        merged = self.ties is not None or self.dare is not None
        return self.known_scale() != 1.0 or merged or self.skip_embeddings or self.align is not None


class FoundChanges(Changes):
    """The same, with a strength that may be found by forward passes."""

    scale: float | Literal["auto"] = 1.0  # type: ignore[assignment]  # wider: others ask known_scale
    """Strength: new base + scale x difference, also where an adapter is what makes it. auto: one for each layer group,
    found on a few labelled dev examples with forward passes only."""

    @field_validator("scale", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, validate: Callable[[Any], float | str]) -> float | str:
        try:
            return validate(value)
        except ValidationError as error:  # it would name each type of the union
            raise ValueError(f"found {value!r}, expected: a finite number, or auto") from error

    def known_scale(self) -> float:
        """The scale, 1 where it is still to be found."""
        return 1.0 if self.scale == "auto" else float(self.scale)


AS_THEY_ARE = Changes()
"""Differences are added to the new base unchanged."""
