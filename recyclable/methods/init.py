"""Init: outdated weights are where training starts (arXiv 2305.08702, section 5.1)."""

from __future__ import annotations

from typing import Literal

from recyclable.methods.parts.learning import LearnsFromLabels
from recyclable.methods.parts.starts import StartsOutdated


class Init(StartsOutdated, LearnsFromLabels):
    """Outdated weights, labels."""

    method: Literal["init"] = "init"
