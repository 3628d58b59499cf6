"""Both: outdated weights are the start, and the old model teaches (arXiv 2305.08702, section 5.3)."""

from __future__ import annotations

from typing import Literal

from recyclable.methods.parts.learning import LearnsFromTeacher
from recyclable.methods.parts.starts import StartsOutdated


class Both(StartsOutdated, LearnsFromTeacher):
    """Outdated weights, labels and the old model as a teacher."""

    method: Literal["both"] = "both"
