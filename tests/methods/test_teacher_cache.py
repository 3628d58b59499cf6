"""A cached teacher's directory is tried before anything is read."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from recyclable.errors import InputError
from recyclable.methods.both import Both

GIVEN = {"base": "b", "old_base": "a", "weights": "w", "task": "t", "learning_rate": 1e-3, "max_steps": 1}


@pytest.mark.parametrize("place", ["/etc/passwd/x", "/proc/x", "/dev/null", "{tmp}/new/cache"])
def test_a_directory_that_cannot_be_made_is_refused_and_one_that_can_is_not_made_yet(
    place: str, tmp_path: Path
) -> None:
    path = Path(place.format(tmp=tmp_path))
    method = Both.model_validate({**GIVEN, "out": tmp_path / "out", "teacher_cache": path})
    scene = MagicMock()
    scene.kind.over_vocabulary = False
    scene.carried.other_tokens.return_value = None
    if tmp_path in path.parents:
        method.require(scene)
    else:
        with pytest.raises(InputError, match=rf"^teacher_cache: {path} .*, expected a directory"):
            method.require(scene)
    assert not list(tmp_path.iterdir())
