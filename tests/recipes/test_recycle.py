"""`recyclable recycle`: what it takes for a method."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from torch import nn

from recyclable.errors import InputError
from recyclable.methods.parts.method import Method
from recyclable.methods.parts.scene import Scene
from recyclable.recipes.recycle import recycle


class Alone(Method):
    """A plug-in that neither learns nor trains nothing."""

    method: Literal["alone"]

    def student(self, scene: Scene) -> nn.Module:
        raise AssertionError("nobody asks")


def test_a_method_that_nobody_knows_how_to_run_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    missing = dict.fromkeys(("weights", "old_base", "base", "task"), str(tmp_path / "missing"))
    method = Alone(method="alone", out=tmp_path / "out", **missing)
    with pytest.raises(InputError, match=r"method: alone derives neither from LearnsFromLabels nor from TrainsNothing"):
        recycle(method, {})
    assert not (tmp_path / "out").exists()
