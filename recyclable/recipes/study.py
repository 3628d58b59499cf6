"""`recyclable study`: a grid of bases, tasks, tuning kinds, methods and seeds as one restartable job."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recyclable import distributed
from recyclable.config.settings import RunSettings
from recyclable.errors import Preempted
from recyclable.launching import preemption
from recyclable.recipes.study_plan import Cell, base_folder, plan, text_folder
from recyclable.recipes.study_settings import StudySettings
from recyclable.recipes.text_loss import RESULT as TEXT_LOSS
from recyclable.report.study_report import write_study_report
from recyclable.tasks.parts.task import load_task
from recyclable.weights.lineage import read_lineage
from recyclable.weights.manifest import read_manifest
from recyclable.weights.strict_json import read_json

_POLL_SECONDS = 5


def study(config: StudySettings, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Run every cell that is not finished and report; returns the report's tables.

    Any number of these may run at once: each takes the cells that are free. A study always goes on from what is there,
    so `resume` changes nothing.
    """
    cells = {cell.name: cell for cell in plan(config)}
    for task in config.tasks.values():
        load_task(task)
    while waiting := distributed.broadcast_object([n for n, cell in cells.items() if not cell.is_done(config.out)]):
        if by := distributed.broadcast_object(preemption.asked()):
            raise Preempted(f"ended by {by} after a cell that is whole: go on by starting it again")
        with _taken(config.out, [cells[name] for name in waiting]) as name:
            if name is None:
                time.sleep(_POLL_SECONDS)
                continue
            distributed.say(f"study  {name}  ({len(waiting)} of {len(cells)} left)")
            cells[name].recipe(cells[name].config(), ds_config, True)
    return write_study_report(collect(config), config.out, bases(config)) if distributed.is_main() else {}


def runs(config: StudySettings) -> list[RunSettings]:
    """Every run config that a cell may come to have."""
    return [run for cell in plan(config) for run in cell.possible]


def collect(config: StudySettings) -> list[dict[str, Any]]:
    """Every finished run with its facts, for `report.study_report`."""
    records = []
    for cell in plan(config):
        if cell.facts is not None and cell.is_done(config.out):
            run = vars(read_manifest(config.out / cell.name))
            selection = cell.facts["seed"] == config.selection_seed
            settings = {name: run["settings"][name] for name in _varied(config, cell.facts)}
            facts = {**cell.facts, "reported": not selection, "settings": settings, "run": run}
            records.append({**facts, "texts": _texts(config, cell.name)})
    return records


def bases(config: StudySettings) -> list[dict[str, Any]]:
    """A row per base that there is: where it comes from, what it learned of its text, what it forgot of the study's."""
    rows = []
    for name, base in config.bases.items():
        heldout = (read_lineage(Path(base_folder(config, name))) or {}) if base.path is None else {}
        told = _texts(config, f"bases/{name}")
        if base.path is None and not heldout:
            continue
        before, after = (heldout.get("heldout", {}).get(when, {}).get("loss") for when in ("before", "after"))
        rows.append({"base": name, "parent": base.parent, "before": before, "after": after, **told})
    return rows


def _texts(config: StudySettings, cell: str) -> dict[str, float]:
    """`loss_<text>` -> the loss of a cell's result on it, as far as it has been told."""
    file = text_folder(config, cell) / TEXT_LOSS
    return {f"loss_{name}": loss for name, loss in read_json(file).items()} if file.is_file() else {}


def _varied(config: StudySettings, facts: dict[str, Any]) -> list[str]:
    """Names of the settings that a method's candidates differ in."""
    if facts["experiment"] not in config.experiments:
        return []
    method = config.experiments[facts["experiment"]].methods[facts["method"]]
    return sorted({name for candidate in method.candidates(facts["tuning"]) for name in candidate})


@contextmanager
def _taken(out: Path, waiting: list[Cell]) -> Iterator[str | None]:
    """Name of a cell that is free and whose dependencies are done, held by this job alone; None if there is none now.

    The lock is the operating system's: it ends with the process, so a killed job leaves none behind.
    """
    open_names = {cell.name for cell in waiting}
    taken = lock = None
    if distributed.is_main():
        for cell in waiting:
            if not open_names.isdisjoint(cell.depends):
                continue
            path = out / ".locks" / cell.name.replace("/", "--")
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            if not cell.is_done(out):
                taken = cell.name
                break
            lock.close()
    try:
        yield distributed.broadcast_object(taken)
    finally:
        if lock is not None:  # closing twice does no harm
            lock.close()
