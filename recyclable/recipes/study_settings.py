"""The run config of `recyclable study`: bases x tasks x tuning kinds x methods x seeds x shots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from recyclable.config.run_file import make_config
from recyclable.config.settings import CorpusSettings, Settings
from recyclable.errors import InputError
from recyclable.methods import METHODS
from recyclable.registry import Registry
from recyclable.tunings import TUNINGS


def _named(registry: Registry[Any]) -> AfterValidator:
    def known(name: str) -> str:
        if name not in registry.names():
            raise ValueError(f"found {name!r}, expected one of {', '.join(registry.names())}")
        return name

    return AfterValidator(known)


class StudyBase(Settings):
    """One base of a study: given (path) or made by continual pre-training of another."""

    path: str | None = None
    parent: str | None = None
    """Name of another base of the study, or a path or hub name."""
    corpus: CorpusSettings | None = None
    settings: dict[str, Any] = Field({})
    """Pre-training settings of this base, over the study's `pretrain`."""

    @model_validator(mode="after")
    def _one_origin(self) -> StudyBase:
        made = (self.parent is not None, self.corpus is not None)
        if made != ((False, False) if self.path is not None else (True, True)):
            raise ValueError("needs either `path`, or `parent` and `corpus`")
        return self


class StudyEdge(Settings):
    """One upgrade that weights are recycled over."""

    old: str
    new: str
    tuning: list[Annotated[str, _named(TUNINGS)]] = Field(["full"])

    @property
    def name(self) -> str:
        """OLD-NEW: how experiments and directories call it."""
        return f"{self.old}-{self.new}"


_UNCHANGED: list[dict[str, Any]] = [{}]


class StudyMethod(Settings):
    """One method of an experiment and the settings its hyperparameters are chosen from."""

    settings: list[dict[str, Any]] | dict[str, list[dict[str, Any]]] = Field(_UNCHANGED)
    """Candidates, or candidates by tuning kind; the best on the selection seed's dev set is used for all seeds."""

    def candidates(self, tuning: str) -> list[dict[str, Any]]:
        """The settings to choose from for one kind of tuning."""
        if isinstance(self.settings, list):
            return self.settings
        if tuning not in self.settings:
            raise InputError("settings", f"no candidates for tuning {tuning!r}, found {sorted(self.settings)}")
        return self.settings[tuning]


class StudyExperiment(Settings):
    """A set of methods compared under the same conditions."""

    shots: int | None = None
    recycle: dict[str, Any] = Field({})
    """Settings of every run of the experiment; each method takes those that it reads."""
    methods: dict[Annotated[str, _named(METHODS)], StudyMethod]
    tasks: list[str] | None = None
    """The tasks it is run on; null: all of the study's."""
    edges: list[str] | None = None
    """The edges it is run on, as OLD-NEW; null: all of the study's."""
    weights_from: dict[str, str] = Field({})
    """Task -> the task of the study whose outdated weights it recycles; left out: its own."""

    def shared(self, method: str) -> dict[str, Any]:
        """The settings of every run that this method reads."""
        return {key: value for key, value in self.recycle.items() if key in METHODS.get(method).model_fields}

    @model_validator(mode="after")
    def _shared_are_read(self) -> StudyExperiment:
        for key in self.recycle:
            if not any(key in METHODS.get(method).model_fields for method in self.methods):
                raise ValueError(f"recycle: none of the methods {', '.join(self.methods)} reads {key!r}")
        return self


class StudySettings(Settings):
    """A grid of runs as one restartable job."""

    purpose: ClassVar[str] = "study"

    out: Path
    bases: dict[str, StudyBase]
    tasks: dict[str, str | dict[str, Any]]
    edges: list[StudyEdge]
    seeds: list[int]
    selection_seed: int | None = None
    """Seed on which hyperparameters are chosen; it is not reported. Needed where a method has several candidates."""
    pretrain: dict[str, Any] = Field({})
    tune: dict[str, Any] = Field({})
    """Settings of the runs that make the outdated weights."""
    tune_by_tuning: dict[str, dict[str, Any]] = Field({})
    """More of them by kind of tuning, for example the adapter's learning rate."""
    tune_by_task: dict[str, dict[str, Any]] = Field({})
    """More of them by task, over the others."""
    texts: dict[str, CorpusSettings] = Field({})
    """Name -> text that every base tells, and every model tuned or recycled for a task whose answers are text: what it
    has forgotten. Of a corpus `train` is taken."""
    text_settings: dict[str, Any] = Field({})
    """How: `max_length`, `max_sequences`, `eval_batch_size`."""
    experiments: dict[str, StudyExperiment]

    def edges_of(self, experiment: str) -> list[StudyEdge]:
        """The edges that an experiment is run on, in the study's order."""
        wanted = self.experiments[experiment].edges
        return [edge for edge in self.edges if wanted is None or edge.name in wanted]

    @model_validator(mode="after")
    def _consistent(self) -> StudySettings:
        for edge in self.edges:
            for base in (edge.old, edge.new):
                if base not in self.bases:
                    raise ValueError(f"edges: {base!r} is not one of bases {sorted(self.bases)}")
        if strange := self.tune_by_task.keys() - self.tasks.keys():
            raise ValueError(f"tune_by_task: {min(strange)!r} is not one of tasks {sorted(self.tasks)}")
        for name, experiment in self.experiments.items():
            for task in {*(experiment.tasks or ()), *experiment.weights_from, *experiment.weights_from.values()}:
                if task not in self.tasks:
                    raise ValueError(f"experiments.{name}: {task!r} is not one of tasks {sorted(self.tasks)}")
            known = [edge.name for edge in self.edges]
            if unknown := set(experiment.edges or ()) - set(known):
                raise ValueError(f"experiments.{name}: {min(unknown)!r} is not one of edges {known}")
        several = any(
            len(method.candidates(tuning)) > 1
            for name, experiment in self.experiments.items()
            for method in experiment.methods.values()
            for edge in self.edges_of(name)
            for tuning in edge.tuning
        )
        if several and self.selection_seed is None:
            raise ValueError("selection_seed: missing, but a method has several settings to choose from")
        if self.selection_seed in self.seeds:
            raise ValueError(f"selection_seed: {self.selection_seed} is also one of the reported seeds")
        return self


def read_study_settings(content: dict[str, Any], where: object) -> StudySettings:
    """Raises InputError."""
    return make_config(StudySettings, content, where)
