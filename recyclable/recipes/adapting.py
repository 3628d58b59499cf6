"""What tuning and recycling share: a student on a task, the run, the adapted weights on disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recyclable import models
from recyclable.config import AdaptSettings, TuningSettings
from recyclable.data.examples import LabelledTexts
from recyclable.data.fewshot import k_shot, limit
from recyclable.data.metrics import SELECTING, main_metric, score
from recyclable.data.tasks import Split, Task
from recyclable.errors import InputError
from recyclable.objectives.objective import Objective
from recyclable.objectives.teacher_cache import TaughtExamples
from recyclable.training import distributed, rundir
from recyclable.training.evaluation import predict
from recyclable.training.loop import Outcome, Scores, train
from recyclable.weights.adapted import ADAPTER, DELTA, HEAD, MANIFEST, AdaptedWeights, Manifest, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import InMemory, Ranged, Renamed, SafetensorsFile
from recyclable.weights.delta import Codec, write_delta, write_differences
from recyclable.weights.differences import Differences
from recyclable.weights.files import write_in_pieces
from recyclable.weights.fingerprint import Fingerprint
from recyclable.weights.lineage import described
from recyclable.weights.vocabulary import load_tokenizer


@dataclass(frozen=True)
class TaskData:
    """A task's splits as a run uses them."""

    task: Task
    train: LabelledTexts | TaughtExamples
    dev: LabelledTexts
    test: LabelledTexts | None
    metric: str
    """The dev score that selects the best step."""


@dataclass(frozen=True)
class Student:
    """A model about to be adapted, and everything its manifest will say."""

    model: nn.Module
    base: Base
    own: Fingerprint
    tuning: TuningSettings
    data: TaskData
    config: AdaptSettings


def task_data(config: AdaptSettings, task: Task, folder: Path) -> TaskData:
    """Draw the shots and tokenise with the tokenizer in `folder`; the same shots whatever the method and the base."""
    if "dev" not in task.splits:
        raise InputError(config.task, "has no dev split, which selects the best step")
    splits = {name: task.splits[name] for name in ("train", "dev", "test") if name in task.splits}
    if config.shots is not None:
        splits.update({name: _few(splits[name], config, task, name) for name in ("train", "dev")})
    if config.max_dev_examples is not None:
        splits["dev"] = limit(splits["dev"], config.max_dev_examples, config.seed)
    if config.max_test_examples is not None and "test" in splits:
        splits["test"] = limit(splits["test"], config.max_test_examples, config.seed)
    if len(splits["train"]) < distributed.world_size():
        raise InputError(config.task, f"{len(splits['train'])} training examples for {distributed.world_size()} ranks")
    metric = config.metric or main_metric(task.problem)
    if metric not in SELECTING[task.problem]:
        expected = " or ".join(SELECTING[task.problem])
        raise InputError("metric", f"is {metric!r}, expected {expected} for {task.problem}")
    tokenizer = load_tokenizer(folder)
    models.require_length(folder, config.max_length)
    texts = {name: LabelledTexts(split, tokenizer, config.max_length) for name, split in splits.items()}
    return TaskData(task, texts["train"], texts["dev"], texts.get("test"), metric)


def _few(split: Split, config: AdaptSettings, task: Task, name: str) -> Split:
    few, short = k_shot(split, config.shots, config.seed, task.problem)
    if short and distributed.is_main():
        # regression has one "class" and no labels
        listed = ", ".join(f"{task.labels[i] if task.labels else task.name} ({count})" for i, count in short.items())
        print(f"notice: fewer than {config.shots} {name} examples, all are taken: {listed}", flush=True)
    return few


def scores(module, examples: LabelledTexts, problem: str, config: AdaptSettings, device: str | torch.device) -> Scores:
    """Scores of an objective, plain or inside an engine, on examples shared out to the ranks."""
    return score(problem, predict(module, examples, config.eval_batch_size, device), examples.labels.numpy())


def grouping(config: AdaptSettings, data: TaskData) -> np.ndarray | None:
    """What decides, besides the seed, which training examples share a step: their lengths, or nothing."""
    return data.train.lengths if config.group_by_length else None


def learn(student: Student, objective: Objective, ds_config: dict[str, Any], resume: bool, label: str) -> Outcome:
    """Train on the task, keep the step with the best dev score, score it on test."""
    data, config = student.data, student.config

    def on_dev(engine) -> Scores:
        return scores(engine, data.dev, data.task.problem, config, engine.device)

    def on_test(engine) -> Scores:
        return scores(engine, data.test, data.task.problem, config, engine.device) if data.test else {}

    return train(
        objective,
        data.train,
        on_dev,
        config,
        ds_config,
        out=config.out,
        select=data.metric,
        final=on_test,
        lengths=grouping(config, data),
        resume=resume,
        label=f"{label} {config.out.name}",
    )


def save_learned(
    student: Student, outcome: Outcome, *, method: str, recycled_from: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write what a run learned as adapted weights of the student's base; returns the manifest's metrics."""
    tuned = SafetensorsFile(outcome.tensors)
    if student.tuning.tuning == "full":
        _write_delta(student, tuned)
    else:
        _write_adapter(student, tuned)
    best = next(row for row in outcome.history if row["step"] == outcome.best_step)
    return _finish(student, outcome.history, best, outcome.final, method, recycled_from)


def save_applied(
    student: Student,
    outdated: AdaptedWeights,
    differences: Differences,
    dev: Scores,
    test: Scores,
    method: str,
    recycled_from: dict[str, Any],
) -> dict[str, Any]:
    """Write outdated weights as weights of the student's base, untrained.

    Args:
        differences: what was added to the student's base.
    """
    if outdated.is_adapter:
        _write_adapter(student, InMemory(dict(student.model.named_parameters())))
    elif distributed.is_main():
        if differences is outdated.delta and student.own.weights == outdated.manifest.base["fingerprint"]["weights"]:
            shutil.copyfile(outdated.folder / DELTA, student.config.out / DELTA)
        else:  # without corrections: those are of the old base
            write_differences(student.config.out / DELTA, differences)
        shutil.copyfile(outdated.folder / HEAD, student.config.out / HEAD)
    row = {"step": 0, "examples": 0, "seconds": 0.0, **dev}
    return _finish(student, [row], row, test, method, recycled_from)


def _finish(
    student: Student,
    history: list[dict[str, float]],
    best: dict[str, float],
    test: Scores,
    method: str,
    recycled_from: dict[str, Any] | None,
) -> dict[str, Any]:
    last, config, task = history[-1], student.config, student.data.task
    metrics = {
        "metric": student.data.metric,
        "dev": {name: value for name, value in best.items() if name not in ("step", "examples", "seconds")},
        "test": test,
        "best_step": best["step"],
        "examples": last["examples"],
        "seconds": last["seconds"],
    }
    manifest = Manifest(
        kind="delta" if student.tuning.tuning == "full" else "adapter",
        tuning=student.tuning.model_dump(include=set(TuningSettings.model_fields)),
        task={"name": task.name, "problem": task.problem, "labels": list(task.labels), "digest": task.digest},
        base=described(student.base.folder, config.base, student.own.as_dict()),
        method=method,
        metrics=metrics,
        history=history,
        settings=config.model_dump(mode="json"),
        recycled_from=recycled_from,
    )
    if distributed.is_main():
        write_manifest(config.out, manifest)
    distributed.barrier()
    rundir.clear_scratch(config.out)
    return metrics


def _write_delta(student: Student, tuned: Ranged) -> None:
    """Tuned minus base for what the base has, verbatim for the head; all ranks together, a few pieces at a time."""
    base, out, team = student.base, student.config.out, distributed.Ranks()
    names = models.canonical_names(student.model)
    in_base = Renamed(tuned, {n: name for n, name in names.items() if n in base})
    write_delta(out / DELTA, in_base, base, Codec(), team)
    _write_as_is(out / HEAD, Renamed(tuned, {n: name for n, name in names.items() if n not in base}))


def _write_adapter(student: Student, tensors: Ranged) -> None:
    """PEFT's own format, so that plain peft opens it; the base's path in it is a hint, the manifest decides."""
    out, peft_config = student.config.out, student.model.peft_config["default"]
    name_of = {id(parameter): name for name, parameter in student.model.named_parameters()}
    saved = models.adapter_parameters(student.model)
    _write_as_is(out / ADAPTER, Renamed(tensors, {n: name_of[id(parameter)] for n, parameter in saved.items()}))
    if distributed.is_main():
        peft_config.base_model_name_or_path = str(student.config.base)
        peft_config.save_pretrained(out)


def _write_as_is(path: Path, tensors: Ranged) -> None:
    layout = {name: (tensors.stored(name).dtype, tensors.shape(name)) for name in tensors.names}
    write_in_pieces(path, layout, tensors.read, team=distributed.Ranks())


RESULT = MANIFEST
"""The file that marks a run's directory of adapted weights as whole."""
