"""What `recyclable probe` is told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from recyclable.config.settings import Settings


class ProbeSettings(Settings):
    """`recyclable probe`: weights + a new base (+ a task) -> is it worth recycling?"""

    purpose: ClassVar[str] = "probe"

    weights: str
    """Adapted weights: a directory, or a name in the store."""
    base: str
    """The new base."""
    old_base: str | None = None
    """The base that the weights belong to; null: found by the names in manifest and lineage."""
    task: str | None = None
    """Null: only weights are looked at."""
    to: str | None = None
    """Weights of the same kind tuned on the new base: the path then leads to them, not to the weights unchanged."""
    store: str | None = None
    allow_unrelated: bool = False
    """Try them on a base that is no recorded descendant of their own."""
    examples: int = Field(300, gt=0)
    """Of dev, a fixed random subset."""
    points: int = Field(11, ge=2)
    """Of the path; the paper has 26."""
    out: Path | None = None
    """Where the report goes, and finished points, so that a killed probe goes on; null: nowhere."""

    @model_validator(mode="after")
    def _read_with_a_task(self) -> ProbeSettings:
        if self.task is None:
            self.require_unset(("to", "examples", "points"), "without a task")
        return self
