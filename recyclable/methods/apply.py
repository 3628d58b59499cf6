"""Apply: outdated weights on the new base, unchanged or at a strength that forward passes find."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from recyclable.methods.parts.untrained import TrainsNothing


class Apply(TrainsNothing):
    """Outdated weights, no training."""

    method: Literal["apply"] = "apply"

    @model_validator(mode="after")
    def _read_by_search(self) -> Apply:
        if self.strength() == "none":
            self.require_unset(("strength_examples",), "but scale: auto")
        return self
