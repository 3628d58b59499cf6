"""A task's splits as a run uses them: shots drawn, limits kept, texts tokenised."""

from __future__ import annotations

from dataclasses import dataclass

from recyclable import distributed
from recyclable.config.settings import TaskSettings
from recyclable.data.examples import TaskExamples
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.parts.fewshot import k_shot, limit
from recyclable.tasks.parts.task import Task
from recyclable.weights.reader import Reader


@dataclass(frozen=True)
class TaskData:
    """A task, tokenised."""

    task: Task
    train: TaskExamples
    dev: TaskExamples
    test: TaskExamples | None
    drawn: Split
    """The training texts, of which `train` is what the model reads."""
    metric: str
    """The dev score that selects the best step."""


def task_data(settings: TaskSettings, task: Task, reader: Reader) -> TaskData:
    """Draw the shots and tokenise them; the same shots whatever the method and the base."""
    if "dev" not in task.splits:
        raise InputError(settings.task, "has no dev split, which selects the best step")
    splits = {name: task.splits[name] for name in ("train", "dev", "test") if name in task.splits}
    if settings.shots is not None:
        splits.update({name: _few(splits[name], settings.shots, settings, task, name) for name in ("train", "dev")})
    if settings.max_dev_examples is not None:
        splits["dev"] = limit(splits["dev"], settings.max_dev_examples, settings.seed)
    if settings.max_test_examples is not None and "test" in splits:
        splits["test"] = limit(splits["test"], settings.max_test_examples, settings.seed)
    count, ranks = len(splits["train"]), distributed.world_size()
    if count < ranks:
        raise InputError(settings.task, f"{count} training examples for {ranks} ranks")
    selecting = task.kind.metrics(task.labels)
    metric = settings.metric or selecting[0]
    if metric not in selecting:
        raise InputError("metric", f"is {metric!r}, expected {' or '.join(selecting)} for {task.problem}")
    texts = {name: tokenised(task, split, reader, settings.max_length, name) for name, split in splits.items()}
    task.kind.require_learnable(texts["train"])
    return TaskData(task, texts["train"], texts["dev"], texts.get("test"), splits["train"], metric)


def _few(split: Split, shots: int, settings: TaskSettings, task: Task, name: str) -> Split:
    few, short = k_shot(split, shots, settings.seed, task.kind.strata(split))
    if short:
        names = {i: task.kind.stratum_name(i, task.labels) or task.name for i in short}
        listed = ", ".join(f"{names[i]} ({count})" for i, count in short.items())
        distributed.say(f"notice: fewer than {shots} {name} examples, all are taken: {listed}")
    return few


def tokenised(
    task: Task, split: Split, reader: Reader, max_length: int | None, name: str | None = None
) -> TaskExamples:
    """A split as the reader cuts it, at most `max_length` tokens; InputError where its model could not read them.

    Args:
        name: the split's; what the cut did to it is then told.
    """
    reader.require_length(max_length)
    config = reader.config_for(task.kind.model_class_for(reader.config))
    texts = task.kind.examples_of(task, split, reader.tokenizer(), max_length)
    examples = texts.readable_by(config, reader.prompts)
    if name is not None and (remark := examples.remark) is not None:
        distributed.say(f"notice: {name}: {remark}")
    return examples


def few_examples(
    task: Task,
    reader: Reader,
    max_length: int | None,
    count: int,
    seed: int,
    shots: int | None = None,
    split: str = "train",
) -> TaskExamples:
    """At most `count` examples of a split, out of the few-shot sample where there is one."""
    texts = task.splits[split]
    if shots is not None:
        texts, _ = k_shot(texts, shots, seed, task.kind.strata(texts))
    return tokenised(task, limit(texts, count, seed), reader, max_length)


def unseen_split(task: Task) -> str:
    """Where a strength is found: dev, or train where there is none.

    Outdated weights were tuned on the training texts, and the more they are exaggerated the lower the loss is there.
    """
    return "dev" if "dev" in task.splits else "train"
