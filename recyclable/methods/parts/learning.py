"""What a student learns from: labels, or labels and the old model as its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from recyclable.config.settings import LearnSettings
from recyclable.errors import InputError
from recyclable.methods.parts.method import Method

if TYPE_CHECKING:
    from torch import nn

    from recyclable.data.examples import Examples, TaskExamples
    from recyclable.methods.parts.scene import Scene
    from recyclable.objectives.objective import Objective
    from recyclable.tasks.parts.kind import TaskKind


class LearnsFromLabels(Method, LearnSettings):
    """Labels alone."""

    related_task: bool = False
    """Use another task's weights though its labels are others: the head is fresh, a teacher's logits are left out."""

    def rate(self) -> float | None:
        """`dropout`."""
        return self.dropout

    def objective(self, student: nn.Module, scene: Scene) -> Objective:
        """What is minimised."""
        from recyclable.objectives.of_task import task_objective

        return task_objective(student, scene.kind, self.logits)

    def examples(self, scene: Scene) -> Examples:
        """What it is minimised on; asked for when the run's directory is taken and everything has been read."""
        return scene.data.train


def read_twice(scene: Scene, max_length: int | None) -> TaskExamples:
    """The training texts as student and teacher read them, each with its own tokenizer.

    Raises InputError where the teacher sees less of a text than the student is asked about.
    """
    import torch

    from recyclable.data.examples import ReadTwice
    from recyclable.tasks.parts.task_data import tokenised

    own, others = scene.data.train, tokenised(scene.task, scene.data.drawn, scene.carried.at_home.reader, max_length)
    if not torch.equal(own.labels, others.labels):
        problem = (
            f"is {max_length}: the old tokenizer of {scene.carried.old.folder} cuts off words that the new one keeps"
        )
        raise InputError("max_length", f"{problem}, and a teacher says nothing of them")
    return ReadTwice(own, others)


class Distils(LearnsFromLabels):
    """Labels and a teacher: the old base with the old weights (arXiv 2305.08702, section 5.2)."""

    alpha: float = Field(0.7, ge=0, le=1)
    """Share of distillation: (1 - alpha) task + alpha T^2 KL + beta patient."""
    beta: float = Field(10.0, ge=0)
    """Weight of the patient loss, on hidden states of an encoder's first token, of a decoder's last, or of those that
    tell an answer in text; at 0 nobody computes them."""
    temperature: float = Field(5.0, gt=0)
    kd_reduction: Literal["batchmean", "paper"] = "batchmean"
    """paper: mean over batch *and* classes, as the paper's released code has it."""

    def require(self, scene: Scene) -> None:
        """A teacher reads the student's tokens, and answers in text where the student does."""
        super().require(scene)
        if scene.kind.over_vocabulary and not scene.head:
            theirs = scene.carried.weights
            problem = (
                f"was tuned for {theirs.manifest.task['problem']}, and {scene.kind.name} is taught by weights that"
            )
            raise InputError(theirs.folder, f"{problem} answer in text")
        self._require_read(scene)

    def require_kind(self, kind: TaskKind) -> None:
        """Where answers are text they are told token by token over the vocabulary."""
        super().require_kind(kind)
        if kind.over_vocabulary and self.kd_reduction == "paper":
            problem = f"is paper, expected batchmean: in {kind.name} there are no classes to divide by"
            raise InputError("kd_reduction", problem)

    def _require_read(self, scene: Scene) -> None:
        """InputError where the teacher cannot read what the student reads."""
        scene.carried.require_same_tokens("a teacher reads the student's tokens; methods init and apply need none")
        theirs = scene.carried.at_home.reader
        scene.data.train.readable_by(theirs.config_for(scene.kind.model_class_for(theirs.config)), theirs.prompts)

    def teaching(self, scene: Scene) -> nn.Module:
        """The old base with the old weights, unread."""
        return scene.teacher(self.seed)


class LearnsFromTeacher(Distils):
    """A teacher that answers in every step, or once for each example, before training."""

    teacher: Literal["online", "cached"] | None = None
    """online: the teacher computes in every step; cached: it answers once per example used, before training starts;
    null: cached, but online where answers are text."""
    teacher_cache: Path | None = None
    """Directory that keeps a cached teacher's answers for other runs; null: in memory, for this run only (for each
    example used, layers x width numbers)."""
    teacher_top_k: int | None = Field(None, gt=0)
    """Only so many of the teacher's likeliest classes are learned from, the others count as impossible; null: all."""

    @model_validator(mode="after")
    def _read_by_cache(self) -> LearnsFromTeacher:
        if self.teacher == "online":
            self.require_unset(("teacher_cache",), "with teacher: online")
        return self

    def require(self, scene: Scene) -> None:
        """As `Distils`; a cache needs a directory. A collective."""
        from recyclable.training.rundir import require_writable

        super().require(scene)
        if self.teacher_cache is None:
            return
        if self.teacher_cache.is_file():
            raise InputError("teacher_cache", f"{self.teacher_cache} is a file, expected a directory or none yet")
        require_writable("teacher_cache", self.teacher_cache)

    def _require_read(self, scene: Scene) -> None:
        """Where both bases' tokens differ, the teacher reads the texts with its own tokenizer; not where answers are
        text, which it tells token by token.
        """
        if scene.kind.over_vocabulary or scene.carried.other_tokens() is None:
            return super()._require_read(scene)
        read_twice(scene, self.max_length)

    def require_kind(self, kind: TaskKind) -> None:
        """Nor is such a teacher's answer kept: a probability per token of the vocabulary and predicted token."""
        super().require_kind(kind)
        for name in ("teacher_cache", "teacher_top_k") if kind.over_vocabulary else ():
            if (value := getattr(self, name)) is not None:
                problem = f"is {value}, expected null: in {kind.name} the teacher answers online, about"
                raise InputError(name, f"{problem} all tokens of its vocabulary")
        if kind.over_vocabulary and self.teacher == "cached":
            problem = f"is cached, expected online: in {kind.name} it tells a distribution over the vocabulary"
            raise InputError("teacher", f"{problem} for every token of an answer, too much to keep")
        if self.teacher_top_k is not None and not kind.exclusive:
            problem = f"is {self.teacher_top_k}, expected null: in {kind.name} no label makes another impossible"
            raise InputError("teacher_top_k", problem)

    def online(self, kind: TaskKind) -> bool:
        """Whether the teacher computes in every step."""
        return kind.over_vocabulary if self.teacher is None else self.teacher == "online"

    def objective(self, student: nn.Module, scene: Scene) -> Objective:
        """Labels and the teacher; without its logits where its head is for other labels."""
        from recyclable.objectives.of_task import taught_objective

        return taught_objective(
            student,
            scene.kind,
            self.teaching(scene) if self.online(scene.kind) else None,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            reduction=self.kd_reduction,
            top_k=self.teacher_top_k,
            same_labels=scene.head,
            logits=self.logits,
        )

    def examples(self, scene: Scene) -> Examples:
        """With the answers of a cached teacher."""
        train: TaskExamples = scene.data.train
        if not scene.kind.over_vocabulary and scene.carried.other_tokens() is not None:
            train = read_twice(scene, self.max_length)
        if self.online(scene.kind):
            return train
        from recyclable.objectives.teachers import OnlineTeacher
        from recyclable.training.teaching import taught

        def teacher() -> OnlineTeacher:
            return OnlineTeacher(self.teaching(scene), scene.kind, self.beta > 0, self.teacher_top_k)

        manifest = scene.carried.weights.manifest
        key = {
            "weights": manifest.files,
            "base": manifest.base["fingerprint"],
            "tuning": manifest.tuning,
            "config": manifest.config,
            "task": scene.kind.name,
            "top_k": self.teacher_top_k,
            "states": self.beta > 0,
        }
        return taught(train, teacher, key, self.teacher_cache, self, scene.ds_config)
