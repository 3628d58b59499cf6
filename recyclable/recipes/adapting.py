"""What tuning and recycling share: a student on a task, the run, the adapted weights on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn

from recyclable import distributed
from recyclable.carrying.places import adapter_parameters, canonical_names, only_parameters, saved_tensors
from recyclable.config.settings import LearnSettings, TaskSettings
from recyclable.data.examples import Examples, TaskExamples
from recyclable.objectives.objective import Objective
from recyclable.tasks.parts.task_data import TaskData
from recyclable.training import early_stopping, rundir
from recyclable.training.asking import Asked
from recyclable.training.loop import Outcome, Scores, train
from recyclable.training.teaching import grouping
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Renamed, SafetensorsFile
from recyclable.weights.delta import Codec, write_delta
from recyclable.weights.files import write_as_is, write_tensors
from recyclable.weights.fingerprint import Fingerprint
from recyclable.weights.hashes import sha256_json
from recyclable.weights.lineage import described
from recyclable.weights.manifest import ADAPTER, DELTA, HEAD, MANIFEST, Manifest

RESULT = MANIFEST
"""The file that marks a run's directory of adapted weights as whole."""
_NO_SCORES = ("step", "examples", "seconds", "skipped")
"""What else stands in a row of the history."""


@dataclass(frozen=True)
class Student:
    """A model about to be adapted, and everything its manifest will say."""

    model: nn.Module
    base: Base
    own: Fingerprint
    tuning: dict[str, Any]
    """The kind of tuning and its settings, as manifests have them."""
    data: TaskData
    settings: TaskSettings
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config that are not its base's, as manifests have them."""
    like: AdaptedWeights | None = None
    """The outdated weights whose tokenizer it has, if any."""

    def reads(self) -> dict[str, str]:
        """What the run reads, as messages call it -> content digest."""
        found = {**self.own.told("base", self.base), "task": self.data.task.digest}
        return found if self.like is None else {**found, "weights": sha256_json(self.like.manifest.files)}

    @property
    def kind(self) -> str:
        """What is saved, as manifests have it."""
        if isinstance(self.model, PeftModel):
            return "adapter"
        return "delta" if self.tuning["tuning"] == "full" else "partial"


def learn(
    student: Student,
    objective: Objective,
    examples: Examples,
    settings: LearnSettings,
    ds_config: dict[str, Any],
    resume: bool,
    label: str,
) -> Outcome:
    """Train on the task, keep the step with the best dev score, score it on test."""
    data = student.data

    def scores(engine: Any, split: TaskExamples, wanted: Collection[str] | None = None) -> Scores:
        ask = Asked(engine, settings.eval_batch_size, engine.device)
        return data.task.kind.scores(ask, split, data.task.labels, wanted)

    def on_dev(engine: Any) -> Scores:
        return scores(engine, data.dev, [data.metric])

    def on_test(engine: Any) -> Scores:
        return scores(engine, data.test) if data.test is not None else {}

    return train(
        objective,
        examples,
        on_dev,
        settings,
        ds_config,
        out=settings.out,
        select=data.metric,
        final=on_test,
        lengths=grouping(data.train, settings),
        reads=student.reads,
        stopped=partial(early_stopping.stopped, settings=settings, metric=data.metric),
        resume=resume,
        label=f"{label} {settings.out.name}",
    )


def save_learned(
    student: Student, outcome: Outcome, *, method: str, recycled_from: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write what a run learned as adapted weights of the student's base; returns the manifest's metrics."""
    tuned = SafetensorsFile(outcome.tensors)
    if student.kind == "adapter":
        _write_adapter(student, tuned)
    else:
        _write_delta(student, tuned)
    best = next(row for row in outcome.history if row["step"] == outcome.best_step)
    history, early = outcome.history, outcome.stopped_early
    return finish(student, history, best, outcome.final, method, recycled_from, outcome.skipped, early)


def finish(
    student: Student,
    history: list[dict[str, float]],
    best: dict[str, float],
    test: Scores,
    method: str,
    recycled_from: dict[str, Any] | None,
    skipped: Sequence[int] = (),
    stopped_early: bool = False,
) -> dict[str, Any]:
    """Write the manifest, which marks the directory as whole; returns its metrics.

    Args:
        history: a row per evaluation; `best`: the row of the weights that are kept.
        test: their scores on test.
        skipped: steps that were left out as bad.
        stopped_early: whether the last evaluation ended the run.
    """
    last, settings, task = history[-1], student.settings, student.data.task
    metrics = {
        "metric": student.data.metric,
        "dev": {name: value for name, value in best.items() if name not in _NO_SCORES},
        "test": test,
        "best_step": best["step"],
        "examples": last["examples"],
        "seconds": last["seconds"],
        **({"skipped_steps": [*skipped]} if skipped else {}),
        **({"stopped_early_at": last["step"]} if stopped_early else {}),
    }
    like = student.like
    manifest = Manifest(
        kind=student.kind,
        tuning=student.tuning,
        task=task.described(),
        base=described(student.base.folder, settings.base, student.own.as_dict()),
        method=method,
        metrics=metrics,
        history=history,
        settings=settings.model_dump(mode="json"),
        recycled_from=recycled_from,
        config=student.config,
        tokenizer=like.manifest.tokenizer if like is not None else None,
    )

    def complete() -> None:
        if like is not None:
            like.copy_tokenizer(settings.out)
        write_manifest(settings.out, manifest)

    distributed.main_writes(complete)
    told = "  ".join(f"{name} {value:.4f}" for name, value in test.items())
    steps = f"best step {best['step']}" + (f", stopped early at {last['step']}" if stopped_early else "")
    distributed.say(f"{method} {settings.out.name}  {steps}" + (f"  test: {told}" if told else ""))
    rundir.clear_scratch(settings.out)
    return metrics


def _write_delta(student: Student, tuned: SafetensorsFile) -> None:
    """Tuned minus base for what the base has, verbatim for the head; all ranks together, a few pieces at a time."""
    base, out, team = student.base, student.settings.out, distributed.Ranks()
    names = canonical_names(student.model)
    in_base = {n: name for n, name in names.items() if n in base}
    trained = {n: name for n, name in in_base.items() if name in tuned}
    write_delta(out / DELTA, Renamed(tuned, trained), base, Codec(), team, in_base.keys() - trained.keys())
    write_as_is(out / HEAD, Renamed(tuned, {n: name for n, name in names.items() if n not in base}), team)


def _write_adapter(student: Student, tuned: SafetensorsFile) -> None:
    """PEFT's own format, so that plain peft opens it; the base's path in it is a hint, the manifest decides."""
    out, model = student.settings.out, student.model
    assert isinstance(model, PeftModel)
    if only_parameters(model):
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        renamed = Renamed(tuned, {n: name_of[id(parameter)] for n, parameter in adapter_parameters(model).items()})
        write_as_is(out / ADAPTER, renamed, distributed.Ranks())
    else:

        def as_peft_does() -> None:
            saved = saved_tensors(model, {name: tuned[name] for name in tuned.names})
            write_tensors(out / ADAPTER, {name: saved[name].detach().cpu().contiguous() for name in sorted(saved)})

        distributed.main_writes(as_peft_does)
    peft_config = model.peft_config["default"]
    peft_config.base_model_name_or_path = str(student.settings.base)
    distributed.main_writes(lambda: peft_config.save_pretrained(str(out)))
