"""The objective of a kind of task: over its classes, or over the vocabulary where its answers are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from recyclable.objectives.distillation import Distillation
from recyclable.objectives.interpolation import Interpolation
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import CachedTeacher, OnlineTeacher
from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
from recyclable.objectives.token_interpolation import TokenInterpolation
from recyclable.objectives.token_loss import TokenLoss
from recyclable.objectives.token_states import Compared
from recyclable.tasks.parts.kind import TaskKind


def task_objective(student: nn.Module, kind: TaskKind) -> Objective:
    """Learning a task from its labels alone."""
    return TokenLoss(student, answers=kind.answers) if kind.over_vocabulary else LabelledTask(student, kind)


def taught_objective(
    student: nn.Module,
    kind: TaskKind,
    teaching: nn.Module | None,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: str,
    top_k: int | None,
    logits: bool,
) -> Objective:
    """Learning it from a teacher too.

    Args:
        teaching: the teacher's model; None where its answers come with the batches, which text's never do.
        reduction, logits: as for `Distillation`; top_k: as for `OnlineTeacher`. Text has but the defaults.
    """
    settings: dict[str, Any] = {"alpha": alpha, "beta": beta, "temperature": temperature}
    if kind.over_vocabulary:
        assert teaching is not None, "a teacher over a vocabulary answers online"
        teacher = TokenTeacher(teaching, _compared(beta > 0))
        return TokenDistillation(student, teacher, **settings, answers=kind.answers)
    told = CachedTeacher() if teaching is None else OnlineTeacher(teaching, kind, beta > 0, top_k)
    return Distillation(student, kind, told, **settings, reduction=reduction, logits=logits)


def interpolated_objective(
    student: nn.Module,
    kind: TaskKind,
    teaching: nn.Module,
    *,
    betas: Sequence[float],
    reduction: str,
    logits: bool,
    **path: Any,
) -> Objective:
    """Learning it from a teacher along the path to it; arguments are those of `Interpolation`."""
    if kind.over_vocabulary:
        teacher = TokenTeacher(teaching, _compared(any(betas)))
        return TokenInterpolation(student, teacher, betas=betas, answers=kind.answers, **path)
    told = OnlineTeacher(teaching, kind, with_states=any(betas))
    return Interpolation(student, kind, told, betas=betas, reduction=reduction, logits=logits, **path)


def _compared(states: bool) -> Compared | None:
    """Of models that answer in text the predicting tokens' states are compared."""
    return Compared(first=False) if states else None
