"""Scratch: what everybody does without recycling, the control of all others."""

from __future__ import annotations

from typing import Literal

from recyclable.methods.parts.learning import LearnsFromLabels
from recyclable.methods.parts.starts import StartsFresh


class Scratch(StartsFresh, LearnsFromLabels):
    """Fresh weights, labels."""

    method: Literal["scratch"] = "scratch"
