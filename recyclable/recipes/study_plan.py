"""Which runs a study is made of, in an order in which each comes after what it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recyclable.config.run_file import make_config
from recyclable.config.settings import RunSettings
from recyclable.methods import METHODS
from recyclable.recipes.adapting import RESULT
from recyclable.recipes.pretrain import pretrain
from recyclable.recipes.pretrain_settings import kind_of, read_pretrain_settings
from recyclable.recipes.recycle import recycle
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.recipes.study_settings import StudyEdge, StudySettings
from recyclable.recipes.text_loss import RESULT as TEXT_LOSS
from recyclable.recipes.text_loss import TextLossSettings, text_loss
from recyclable.recipes.tune import tune
from recyclable.recipes.tune_settings import read_tune_settings
from recyclable.report.compare import dev_best
from recyclable.tasks.parts.task import load_task
from recyclable.weights import lineage
from recyclable.weights.manifest import read_manifest


@dataclass(frozen=True)
class Cell:
    """One run of a study, in the directory it will be found finished in."""

    name: str
    """Directory below the study's."""
    possible: tuple[RunSettings, ...]
    """Every run config it may come to have."""
    config: Callable[[], RunSettings]
    """The one it has; asked for when the cells it depends on are done: it may use their results."""
    recipe: Callable[[Any, dict[str, Any], bool], dict[str, Any]]
    marker: str
    """The file that says it is done."""
    depends: tuple[str, ...] = ()
    facts: dict[str, Any] | None = None
    """What the run is of: the cell's row in the results, without the scores; None for bases."""

    def is_done(self, out: Path) -> bool:
        """Whether the cell's result is complete."""
        return (out / self.name / self.marker).is_file()


def plan(config: StudySettings) -> list[Cell]:
    """All cells in an order in which each comes after what it depends on; every run config is checked here."""
    cells = [_base_cell(config, name) for name in config.bases if config.bases[name].path is None]
    seeds = [*config.seeds, *([] if config.selection_seed is None else [config.selection_seed])]
    tuned_on = {(edge.old, tuning): None for edge in config.edges for tuning in edge.tuning}
    recycled = {e.weights_from.get(t, t) for e in config.experiments.values() for t in e.tasks or config.tasks}
    for name, experiment in config.experiments.items():
        if any(METHODS.get(method).wants_other_tasks for method in experiment.methods):  # tuned on both bases
            recycled.update(config.tasks)
            tuned_on.update({(edge.new, tuning): None for edge in config.edges_of(name) for tuning in edge.tuning})
    for task in (task for task in config.tasks if task in recycled):
        cells += [_tuned_cell(config, base, task, tuning, seed) for base, tuning in tuned_on for seed in seeds]
    for task in config.tasks:
        for name, experiment in config.experiments.items():
            if task in (experiment.tasks or config.tasks):
                cells += [cell for method in experiment.methods for cell in _method_cells(config, name, method, task)]
    if not config.texts:
        return cells
    given = [_base_text_cell(config, name) for name in config.bases if config.bases[name].path is not None]
    return [*given, *(each for cell in cells for each in (cell, *_text_cells(config, cell)))]


def _method_cells(config: StudySettings, experiment: str, method: str, task: str) -> list[Cell]:
    """Candidates of a method on the first edge that has the kind of tuning, then every edge and seed."""
    edges = config.edges_of(experiment)
    first_edge = {tuning: edge for edge in reversed(edges) for tuning in edge.tuning}
    cells = []
    for tuning in dict.fromkeys(tuning for edge in edges for tuning in edge.tuning):
        chosen = _Choice(config, experiment, method, task, tuning, first_edge[tuning])
        cells += chosen.candidates()
        cells += [chosen.reported(edge, seed) for edge in edges if tuning in edge.tuning for seed in config.seeds]
    return cells


def base_folder(config: StudySettings, name: str) -> str:
    """Where a base of the study is, or will be."""
    if name not in config.bases:
        return name
    return config.bases[name].path or str(config.out / "bases" / name)


def _made_here(config: StudySettings, *names: str) -> tuple[str, ...]:
    return tuple(f"bases/{name}" for name in names if name in config.bases and config.bases[name].path is None)


def _root(config: StudySettings, name: str) -> str:
    """The base, of the study or not, that a chain begins with: the others of it need not be there yet."""
    while name in config.bases and (parent := config.bases[name].parent) is not None:
        name = parent
    return name


def _base_cell(config: StudySettings, name: str) -> Cell:
    base = config.bases[name]
    assert base.parent is not None and base.corpus is not None  # or it would have a path
    content = {
        "lm": kind_of(base_folder(config, _root(config, name))),
        **config.pretrain,
        **base.settings,
        "base": base_folder(config, base.parent),
        "corpus": base.corpus.model_dump(),
        "out": config.out / "bases" / name,
    }
    settings = read_pretrain_settings(content, f"bases.{name}")
    return Cell(f"bases/{name}", (settings,), lambda: settings, pretrain, lineage.FILE, _made_here(config, base.parent))


def _tuned_name(old: str, task: str, tuning: str, seed: int) -> str:
    return f"tuned/{old}/{task}/{tuning}/seed{seed}"


def _tuned_cell(config: StudySettings, old: str, task: str, tuning: str, seed: int) -> Cell:
    name = _tuned_name(old, task, tuning, seed)
    content = {
        **config.tune,
        **config.tune_by_tuning.get(tuning, {}),
        **config.tune_by_task.get(task, {}),
        "base": base_folder(config, old),
        "task": config.tasks[task],
        "tuning": tuning,
        "seed": seed,
        "out": config.out / name,
    }
    facts = {
        "experiment": "tuned",
        "old": old,
        "new": old,
        "task": task,
        "tuning": tuning,
        "method": "tune",
        "seed": seed,
    }
    settings = read_tune_settings(content, name)
    return Cell(name, (settings,), lambda: settings, tune, RESULT, _made_here(config, old), {**facts, "setting": 0})


@cache
def _in_text(task: str) -> bool:
    """Whether a task's answers are text; its files are read once, not for every cell.

    Args:
        task: as a study has it, in JSON.
    """
    return load_task(json.loads(task)).kind.over_vocabulary


def text_folder(config: StudySettings, cell: str) -> Path:
    """Where the losses on the study's texts are of a cell's result."""
    return config.out / "texts" / cell


def _text_cells(config: StudySettings, cell: Cell) -> list[Cell]:
    """The cell that tells the study's texts by another's result, where that is a language model."""
    if cell.facts is None:
        return [_base_text_cell(config, Path(cell.name).name)]
    if not _in_text(json.dumps(config.tasks[cell.facts["task"]])):
        return []
    told = {"base": base_folder(config, cell.facts["new"]), "weights": str(config.out / cell.name)}
    return [_text_cell(config, cell.name, told, (cell.name, *cell.depends))]


def _base_text_cell(config: StudySettings, name: str) -> Cell:
    return _text_cell(config, f"bases/{name}", {"base": base_folder(config, name)}, _made_here(config, name))


def _text_cell(config: StudySettings, name: str, told: dict[str, Any], after: tuple[str, ...]) -> Cell:
    content = {**config.text_settings, **told, "texts": config.texts, "out": text_folder(config, name)}
    settings = make_config(TextLossSettings, content, "text_settings")
    return Cell(f"texts/{name}", (settings,), lambda: settings, text_loss, TEXT_LOSS, after)


@dataclass(frozen=True)
class _Choice:
    """One method of one experiment for one kind of tuning: its candidates, and the one that is reported."""

    config: StudySettings
    experiment: str
    method: str
    task: str
    tuning: str
    selection_edge: StudyEdge

    @property
    def _settings(self) -> list[dict[str, Any]]:
        return self.config.experiments[self.experiment].methods[self.method].candidates(self.tuning)

    def candidates(self) -> list[Cell]:
        """A cell per candidate on the selection seed; none where there is nothing to choose."""
        if len(self._settings) == 1:
            return []
        seed = self.config.selection_seed
        assert seed is not None, "StudySettings wants one where there is something to choose"

        def of(setting: int) -> Cell:
            return self._cell(self.selection_edge, seed, lambda: setting, (), f"-setting{setting}", setting)

        return [of(setting) for setting in range(len(self._settings))]

    def reported(self, edge: StudyEdge, seed: int) -> Cell:
        """The cell with the best candidate's settings."""
        names = tuple(cell.name for cell in self.candidates())

        def score(name: str) -> float:
            found = dev_best(vars(read_manifest(self.config.out / name)))
            assert found is not None, "the study's own runs have scores"
            return found

        def best() -> int:
            scores = [score(name) for name in names]
            return scores.index(max(scores)) if scores else 0

        return self._cell(edge, seed, best, names, "", None)

    def _cell(
        self,
        edge: StudyEdge,
        seed: int,
        choose: Callable[[], int],
        after: tuple[str, ...],
        suffix: str,
        setting: int | None,
    ) -> Cell:
        config, experiment = self.config, self.config.experiments[self.experiment]
        name = f"{self.experiment}/{edge.name}/{self.task}/{self.tuning}/{self.method}/seed{seed}{suffix}"
        source = experiment.weights_from.get(self.task, self.task)
        tuned = _tuned_name(edge.old, source, self.tuning, seed)
        known, kind = [], METHODS.get(self.method)
        if kind.wants_other_tasks:  # the study's own
            others = (task for task in config.tasks if task != self.task)
            known = [[_tuned_name(b, task, self.tuning, seed) for b in (edge.old, edge.new)] for task in others]

        def make(setting: int) -> RunSettings:
            content = {
                **experiment.shared(self.method),
                **self._settings[setting],
                "method": self.method,
                "shots": experiment.shots,
                "base": base_folder(config, edge.new),
                "old_base": base_folder(config, edge.old),
                "weights": str(config.out / tuned),
                "task": config.tasks[self.task],
                "seed": seed,
                "out": config.out / name,
            }
            if content.get("teacher") != "online" and not _in_text(json.dumps(config.tasks[self.task])):
                offered = {"teacher_cache": config.out / "teachers"}
                content = {**{key: value for key, value in offered.items() if key in kind.model_fields}, **content}
            if source != self.task and "related_task" in kind.model_fields:
                content["related_task"] = True
            if kind.wants_other_tasks:
                content["project_from"] = [[str(config.out / cell) for cell in pair] for pair in known]
            return read_recycle_settings(content, f"experiments.{self.experiment}.{self.method}")

        possible = tuple(make(i) for i in range(len(self._settings)))
        facts = {
            "experiment": self.experiment,
            "old": edge.old,
            "new": edge.new,
            "task": self.task,
            "tuning": self.tuning,
            "method": self.method,
            "seed": seed,
            "setting": setting,
        }
        depends = (*_made_here(config, edge.old, edge.new), tuned, *(cell for pair in known for cell in pair), *after)
        return Cell(name, possible, lambda: possible[choose()], recycle, RESULT, depends, facts)
