"""`recyclable stack`: one base + several tasks or seeds -> as many adapters, each as `tune` would have made it."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft import PeftModel

from recyclable import distributed, machine
from recyclable.adapters.stacked import Rows
from recyclable.adapters.stacked import stack as stacked
from recyclable.architectures.recomputing import recompute_layers
from recyclable.config.settings import RunSettings
from recyclable.data.token_rows import padding
from recyclable.errors import InputError, RunError
from recyclable.models.tasks import task_model
from recyclable.objectives.stacked import StackedTasks
from recyclable.recipes.adapting import RESULT as RUN_RESULT
from recyclable.recipes.adapting import Student, save_learned
from recyclable.recipes.stack_settings import StackSettings, require_ds_config
from recyclable.recipes.tune_settings import TuneSettings
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import TaskData, task_data
from recyclable.training import best, rundir, zero
from recyclable.training.checkpoint.saving import Saver
from recyclable.training.engine import set_attention, to_ask
from recyclable.training.loop import Outcome
from recyclable.training.stacked import train_stacked
from recyclable.training.stacked_run import StackedRun
from recyclable.weights.base import Base
from recyclable.weights.durable import write_json
from recyclable.weights.files import write_tensors
from recyclable.weights.fingerprint import Fingerprint, fingerprint
from recyclable.weights.lineage import read_lineage
from recyclable.weights.locate import locate
from recyclable.weights.reader import Reader
from recyclable.weights.strict_json import read_json

RESULT = "stack.json"
"""The file that marks a stack as finished."""


def stack(settings: StackSettings, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Train all adapters; returns name -> the metrics of its best step, as `tune` does.

    Raises RunError at the end where a run was given up; the others are saved.
    """
    require_ds_config(ds_config, distributed.world_size(), settings.gradient_checkpointing)
    base, tunes = Base(locate(settings.base)), settings.tunes()
    read_lineage(base.folder)  # is handed on: broken, it is refused now
    reader = Reader.of(base)  # of all: low-rank updates have no prompts
    named = {str(tuned.task): tuned.task for tuned in tunes.values()}  # most stacks are of one task: it is read once
    loaded = {text: load_task(task) for text, task in named.items()}
    made = {name: _made(base, reader, tuned, loaded[str(tuned.task)]) for name, tuned in tunes.items()}
    _require_together(reader, made, ds_config)
    with rundir.claim(settings, settings.out, RESULT, resume, (*rundir.PROGRESS, f"*/{RUN_RESULT}")) as unfinished:
        if not unfinished:
            return dict(read_json(settings.out / RESULT))
        tasks = _tasks(base, reader, next(iter(tunes.values())), list(made.values()), ds_config)
        base.hashed.complete(team=distributed.Ranks())
        own = fingerprint(base)
        runs = [StackedRun(name, tunes[name], one.data, one.model) for name, one in made.items()]
        reads = {**own.told("base", base), **{f"runs.{name}.task": one.data.task.digest for name, one in made.items()}}
        saving = (settings.save_every, settings.save_every_minutes, settings.save_total_limit)
        with Saver(settings.out, *saving) as saver:
            train_stacked(tasks, runs, ds_config, saver, out=settings.out, reads=reads, resume=resume)
        metrics = {run.name: _saved(base, own, made[run.name], run) for run in runs if run.problem is None}
        if lost := [f"{run.name}: {run.problem}" for run in runs if run.problem is not None]:
            raise RunError(settings.out, f"{len(lost)} of {len(runs)} runs were given up: {'; '.join(lost)}")
        distributed.main_writes(lambda: write_json(settings.out / RESULT, metrics))
        rundir.clear_scratch(settings.out)
        return metrics


def runs(settings: StackSettings) -> list[RunSettings]:
    """None whose batch is shared out to the ranks: each run is one rank's."""
    return []


class _Made(NamedTuple):
    """A run's model, unread, and its data, as `tune` has them."""

    model: PeftModel
    data: TaskData
    fields: dict[str, Any]
    """Of the model's config that are not its base's."""


def _made(base: Base, reader: Reader, tuned: TuneSettings, task: Task) -> _Made:
    fields = reader.fields(task.kind.model_class_for(base.config))
    data = task_data(tuned, task, reader)
    return _Made(_model(base, tuned, task, fields), data, fields)


def _model(base: Base, tuned: TuneSettings, task: Task, fields: dict[str, Any]) -> PeftModel:
    bare = task_model(base, task, tuned.seed, tuned.dropout, fields)
    model = tuned.attach(bare, task.kind.task_type_for(base.config), tuned.seed)
    assert isinstance(model, PeftModel)
    return model


def _require_together(reader: Reader, made: dict[str, _Made], ds_config: dict[str, Any]) -> None:
    """InputError for runs that cannot share a forward pass."""
    (first, of_first), *others = made.items()
    head = type(of_first.model.get_base_model()).__name__
    for name, one in others:
        if (own := type(one.model.get_base_model()).__name__) != head:
            problem = f"is for a {own} ({one.data.task.problem}), but {first} for a {head}"
            raise InputError(f"runs.{name}.task", f"{problem}: expected tasks of one kind of model in a stack")
    if machine.precision(ds_config) == "float16":
        raise InputError("fp16", "is enabled, but a stack has no loss scaling: use bf16, or leave it out for fp32")
    if of_first.data.task.kind.over_vocabulary and machine.zero_stage(ds_config) == 3:
        problem = "is 3, but answers in text are told at stage 0 to 2 in a stack: the base has no states to share out"
        raise InputError("zero_optimization.stage", problem)
    if reader.tokenizer().padding_side != "right":
        problem = "pads texts on the left, where their positions would depend on the other runs' lengths"
        raise InputError(reader.folder, f"its tokenizer {problem}: tune one by one")


def _tasks(
    base: Base, reader: Reader, tuned: TuneSettings, made: list[_Made], ds_config: dict[str, Any]
) -> StackedTasks:
    """All adapters on one base, read to where it computes."""
    first, rows = made[0], Rows()
    host = stacked(_model(base, tuned, first.data.task, first.fields), [one.model for one in made], rows)
    set_attention(host, tuned, ds_config)
    if tuned.gradient_checkpointing or machine.recomputes(ds_config):
        recompute_layers(host, machine.saves_on_host(ds_config))
    if machine.zero_stage(ds_config) == 3:  # what a rank gathers in its backward pass must not depend on its adapters
        bare: Any = host.get_base_model()
        bare.enable_input_require_grads()
    kinds = [one.data.task.kind for one in made]
    classes = [one.model.config.num_labels for one in made]
    tasks = StackedTasks(host, rows, kinds, classes, padding(reader.tokenizer()))
    zero.materialize(tasks, to_ask(ds_config))
    return tasks


def _saved(base: Base, own: Fingerprint, made: _Made, run: StackedRun) -> dict[str, Any]:
    """Write a run's adapter as `tune` does; returns its metrics. A collective."""
    tuned, progress = run.settings, run.progress
    assert isinstance(tuned, TuneSettings)
    file = best.tensors_file(tuned.out, progress.best_step)

    def write() -> None:
        tuned.out.mkdir(exist_ok=True)
        write_tensors(file, run.best)

    distributed.main_writes(write)
    student = Student(made.model, base, own, tuned.described(), made.data, tuned, config=made.fields)
    early = progress.step < tuned.max_steps
    outcome = Outcome(progress.history, progress.best_step, file, run.final, progress.skipped, early)
    return save_learned(student, outcome, method="tune")
