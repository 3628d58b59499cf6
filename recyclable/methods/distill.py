"""Distill: the old model teaches fresh weights (arXiv 2305.08702, section 5.2)."""

from __future__ import annotations

from typing import Literal

from recyclable.methods.parts.learning import LearnsFromTeacher
from recyclable.methods.parts.starts import StartsFresh


class Distill(StartsFresh, LearnsFromTeacher):
    """Fresh weights, labels and the old model as a teacher."""

    method: Literal["distill"] = "distill"
