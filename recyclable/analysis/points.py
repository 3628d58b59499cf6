"""Measurements at many points: shared out to the members of a team, and never made twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from recyclable.errors import InputError
from recyclable.weights.durable import write_json
from recyclable.weights.strict_json import read_json
from recyclable.weights.team import ALONE, Team

Place = TypeVar("Place")
Found = dict[str, Any]


def measured(
    points: Mapping[str, Place],
    measure: Callable[[Place], Found],
    *,
    file: Path | None = None,
    key: str = "",
    team: Team = ALONE,
    label: str = "points",
) -> dict[str, Found]:
    """What `measure` finds at each point, by the point's name, in their order, on every member; a collective.

    Args:
        measure: run by one member for each point; what it returns goes through JSON.
        file: finished points are kept there, as they come, and are not measured again; None keeps nothing.
        key: says what is measured on what; InputError when the file holds points of something else.
        label: shown beside a progress bar on a terminal.
    """
    found = team.gather(_kept(file, key) if file and team.rank == 0 else {})[0]
    waiting = [name for name in points if name not in found]
    for start in tqdm(range(0, len(waiting), team.size), label, disable=None if team.rank == 0 else True, leave=False):
        mine = waiting[start : start + team.size][team.rank : team.rank + 1]
        for new in team.gather({name: measure(points[name]) for name in mine}):
            found.update(new)
        if file and team.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"key": key, "points": found}, finite=False)
    return {name: found[name] for name in points}


def _kept(file: Path, key: str) -> dict[str, Found]:
    if not file.is_file():
        return {}
    content = read_json(file)
    if content.get("key") != key or not isinstance(content.get("points"), dict):
        raise InputError(file, "holds points of something else; name another directory, or remove the file")
    return content["points"]
