"""Points are measured once each, by whoever is free, and never again after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recyclable.analysis.points import measured
from recyclable.errors import InputError

POINTS = {"a": 1, "b": 2, "c": 3}


class Counted:
    """Squares, and which it was asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __call__(self, place: int) -> dict[str, float]:
        if place == self.fails_at:
            raise RuntimeError("killed")
        self.asked.append(place)
        return {"value": place**2 / 3}


def test_a_restart_goes_on_where_it_was_killed_and_finds_the_same(tmp_path: Path) -> None:
    file = tmp_path / "new" / "points.json"
    with pytest.raises(RuntimeError):
        measured(POINTS, Counted(fails_at=3), file=file, key="k")
    again = Counted()
    found = measured(POINTS, again, file=file, key="k")
    assert again.asked == [3]
    assert found == measured(POINTS, Counted()) == {n: {"value": p**2 / 3} for n, p in POINTS.items()}
    more = Counted()
    assert list(measured({"c": 3, "z": 9, "a": 1}, more, file=file, key="k")) == ["c", "z", "a"]
    assert more.asked == [9]


def test_points_of_something_else_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    measured(POINTS, Counted(), file=file, key="one")
    with pytest.raises(InputError, match="points of something else"):
        measured(POINTS, Counted(), file=file, key="other")
    file.write_text(json.dumps({"key": "one", "points": 3}))
    with pytest.raises(InputError, match="points of something else"):
        measured(POINTS, Counted(), file=file, key="one")
