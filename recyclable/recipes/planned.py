"""What a run would train, from configs alone: its objective on the meta device and its largest batches.

It is built by what builds a run: the kinds' objectives, the methods', the tunings. Corpora and tasks are not opened, of
weights only the manifest; what only they tell is assumed, and said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from recyclable.architectures.attention import Machine, set_attention
from recyclable.architectures.pooling import PAD
from recyclable.carrying.carried import Carried
from recyclable.config.settings import Settings, TaskSettings, TrainSettings
from recyclable.data.examples import Batch
from recyclable.errors import InputError
from recyclable.lm.parts.kind import LMKind
from recyclable.methods.parts.learning import LearnsFromLabels, LearnsFromTeacher
from recyclable.methods.parts.scene import Scene
from recyclable.models.adapters import attach_same
from recyclable.models.config_only import config_only
from recyclable.models.language import is_decoder
from recyclable.models.tasks import task_model
from recyclable.objectives.apart import Apart, Way
from recyclable.objectives.objective import Objective
from recyclable.objectives.of_task import task_objective
from recyclable.objectives.teachers import SIGNAL_PREFIX, Signals
from recyclable.recipes.tune_settings import TuneSettings
from recyclable.tasks import KINDS
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task import Task
from recyclable.tasks.parts.task_file import describe
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.grown import GrownBase
from recyclable.weights.reader import Reader
from recyclable.weights.sources import become
from recyclable.weights.store import find

LABELS = 2
"""How many labels a task of classes is taken to have that does not list them."""
LENGTH = 512
"""Tokens per text of outdated weights that are not there to say it."""


@dataclass(frozen=True)
class Planned:
    """A run that could be started."""

    objective: Objective
    """On the meta device."""
    batch: Callable[[int], Batch]
    """So many rows -> the largest batch of them."""
    settings: TrainSettings
    base: Base
    assumed: tuple[str, ...] = ()
    """What nothing told, a line each."""
    asked: int = 0
    """Elements of a teacher that answers before training, and is no part of the objective."""


def planned(settings: Settings) -> Planned:
    """What a run with these settings would train; InputError where a base could not."""
    if isinstance(settings, LMKind):
        found = _upgrade(settings)
    elif isinstance(settings, TuneSettings):
        found = _tuning(settings)
    elif isinstance(settings, LearnsFromLabels):
        found = _recycling(settings)
    else:
        raise TypeError(f"{type(settings).__name__} is no run that trains")
    wanted = found.settings.attn_implementation
    # flash-attention keeps what sdpa keeps, and the machine that plans need not have it
    flash = wanted is not None and wanted.startswith("flash")
    set_attention(found.objective.student, "sdpa" if flash else wanted, False, Machine())
    found.objective.to("meta")
    return found


def _upgrade(kind: LMKind) -> Planned:
    base = config_only(kind.base)
    Reader.of(base).require_length(kind.max_length)
    teacher = None if kind.teacher is None else kind.teaching(config_only(kind.teacher))
    apart = None
    assumed: list[str] = []
    if kind.attention == "documents":
        # which way holds for a model only a trial tells; a mask is the dearest one
        window = getattr(base.config.get_text_config(), "sliding_window", None)
        way = Way(positions=None, windows=bool(window) and "layer_types" in vars(base.config.get_text_config()))
        apart = Apart(way, kind.causal, window)
        assumed.append("documents that share a sequence are kept apart by a mask")
    if kind.extend_vocabulary is not None:  # as if no row of padding were there to be used up
        base = GrownBase(base, base.config.vocab_size, [(0,)] * kind.extend_vocabulary)
    model, _ = kind.model(base)
    return Planned(kind.objective(model, teacher, apart, apart), kind.full_batch, kind, base, tuple(assumed))


def _tuning(settings: TuneSettings) -> Planned:
    base = config_only(settings.base)
    task, assumed = _task(settings, base.config)
    Reader(base.config, base.folder, settings.prompts).require_length(settings.max_length)
    bare = _for_task(base, task, settings.seed, settings.dropout)
    with torch.device("meta"):
        model = settings.attach(bare, task.kind.task_type_for(base.config), settings.seed)
    batch = partial(_batch, task, settings.max_length, base.config)
    return Planned(task_objective(model, task.kind, settings.logits), batch, settings, base, tuple(assumed))


def _recycling(method: LearnsFromLabels) -> Planned:
    base, old = config_only(method.base), config_only(method.old_base)
    task, assumed = _task(method, base.config)
    method.require_kind(task.kind)
    weights = _weights(method)
    if weights is None:
        assumed.append(f"{method.weights} are weights of full fine-tuning")
    length = method.max_length
    if length is None and weights is not None:
        length = weights.manifest.settings["max_length"]
    if length is None:
        length = LENGTH
        assumed.append(f"texts have {length} tokens (max_length)")

    def of(where: Base, dropout: float | None = None) -> nn.Module:
        bare = _for_task(where, task, method.seed, dropout)
        with torch.device("meta"):
            return bare if weights is None else attach_same(bare, weights, method.seed)

    scene = _Scene(task, lambda: of(old))
    objective = method.objective(of(base, method.rate()), scene)
    batch: Callable[[int], Batch] = partial(_batch, task, length, base.config)
    asked = 0
    if isinstance(method, LearnsFromTeacher) and not method.online(task.kind):
        batch = partial(_with_answers, method, task, batch, old)
        asked = sum(parameter.numel() for parameter in of(old).parameters())
    settings = method.model_copy(update={"max_length": length})
    return Planned(objective, batch, settings, base, tuple(assumed), asked)


class _Scene(Scene):
    """A recycling run that is not there."""

    def __init__(self, task: Task, teacher: Callable[[], nn.Module]) -> None:
        vars(self).update(head=True, _task=task, _teacher=teacher)  # frozen

    @property
    def kind(self) -> TaskKind:
        """The task's kind."""
        return vars(self)["_task"].kind

    def teacher(self, seed: int, of: Callable[[], Carried] | None = None) -> nn.Module:
        """The old base as weights on it make it."""
        return vars(self)["_teacher"]()


def _task(settings: TaskSettings, config: PretrainedConfig) -> tuple[Task, list[str]]:
    """A task without examples, by what its file says of it; and what was assumed."""
    assumed: list[str] = []
    try:
        _, spec, _ = describe(settings.task)
    except InputError:
        if isinstance(settings.task, dict) or Path(settings.task).is_file():
            raise
        spec = {}
    if (problem := spec.get("problem")) is None:
        text = config.is_encoder_decoder or is_decoder(config)
        problem = "generation" if text else "classification"
        assumed.append(f"the task is one of {problem} (problem)")
    kind, labels = KINDS.get(problem, "problem")(), tuple(map(str, spec.get("labels") or ()))
    if kind.has_labels and not labels:
        labels = tuple(map(str, range(LABELS)))
        assumed.append(f"the task has {LABELS} labels (labels)")
    return Task("task", problem, labels, {}, ""), assumed


def _for_task(base: Base, task: Task, seed: int, dropout: float | None) -> PreTrainedModel:
    """The base with the task's head; with a pad token, which its tokenizer would tell."""
    lacks_pad = getattr(base.config.get_text_config(), PAD, None) is None
    model = task_model(base, task, seed, dropout, {PAD: 0} if lacks_pad else {})
    for parameter in model.parameters():  # adapters that look at the base's values find none, and do without
        become(parameter, nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad))
    return model


def _weights(method: LearnsFromLabels) -> AdaptedWeights | None:
    """The outdated weights, if they are there; only their manifest and the tensors' names are read."""
    try:
        folder = find(method.weights, method.store)
    except InputError:
        return None
    return AdaptedWeights(folder, verify=False) if folder.is_dir() else None


def _batch(task: Task, length: int, config: PretrainedConfig, rows: int) -> Batch:
    return task.kind.full_batch(rows, length, len(task.labels), config)


def _with_answers(method: LearnsFromTeacher, task: Task, made: Callable[[int], Batch], old: Base, rows: int) -> Batch:
    """A batch that brings a teacher's answers along, as a cached one's does."""
    batch, config = made(rows), old.config.get_text_config()
    labels = batch["labels"].shape if task.kind.exclusive else batch["labels"].shape[:1]
    classes = len(task.labels) or 1
    logits = torch.zeros(*labels, min(method.teacher_top_k or classes, classes))
    told = Signals(logits, None, torch.zeros_like(logits, dtype=torch.long) if method.teacher_top_k else None)
    if method.beta:
        told = replace(told, states=torch.zeros(rows, config.num_hidden_layers, config.hidden_size))
    return {**batch, **{f"{SIGNAL_PREFIX}{name}": tensor for name, tensor in told.tensors().items()}}
