"""The objective of a kind of task: over its classes, or over the vocabulary where its answers are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from recyclable.errors import InputError
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


def task_objective(student: nn.Module, kind: TaskKind, logits: str = "fp32") -> Objective:
    """Learning a task from its labels alone.

    Args:
        logits: as for `kernels.LossSettings`; InputError for bf16 where answers are no text.
    """
    if kind.over_vocabulary:
        return TokenLoss(student, answers=kind.answers, logits=logits)
    _require_fp32(logits, kind)
    return LabelledTask(student, kind)


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
    same_labels: bool,
    logits: str,
) -> Objective:
    """Learning it from a teacher too.

    Args:
        teaching: the teacher's model; None where its answers come with the batches, which text's never do.
        reduction, same_labels: as for `Distillation`; top_k: as for `OnlineTeacher`. Text has but the defaults.
        logits: as for `task_objective`.
    """
    settings: dict[str, Any] = {"alpha": alpha, "beta": beta, "temperature": temperature}
    if kind.over_vocabulary:
        assert teaching is not None, "a teacher over a vocabulary answers online"
        teacher = TokenTeacher(teaching, _compared(beta > 0))
        return TokenDistillation(student, teacher, **settings, logits=logits, answers=kind.answers)
    _require_fp32(logits, kind)
    told = CachedTeacher() if teaching is None else OnlineTeacher(teaching, kind, beta > 0, top_k)
    return Distillation(student, kind, told, **settings, reduction=reduction, same_labels=same_labels)


def interpolated_objective(
    student: nn.Module,
    kind: TaskKind,
    teaching: nn.Module,
    *,
    betas: Sequence[float],
    reduction: str,
    same_labels: bool,
    logits: str,
    **path: Any,
) -> Objective:
    """Learning it from a teacher along the path to it.

    Args:
        logits: as for `task_objective`; all others: those of `Interpolation`.
    """
    if kind.over_vocabulary:
        teacher = TokenTeacher(teaching, _compared(any(betas)))
        return TokenInterpolation(student, teacher, betas=betas, logits=logits, answers=kind.answers, **path)
    _require_fp32(logits, kind)
    told = OnlineTeacher(teaching, kind, with_states=any(betas))
    return Interpolation(student, kind, told, betas=betas, reduction=reduction, same_labels=same_labels, **path)


def _require_fp32(logits: str, kind: TaskKind) -> None:
    if logits != "fp32":
        raise InputError("logits", f"is {logits}, expected fp32: in {kind.name} there are none over a vocabulary")


def _compared(states: bool) -> Compared | None:
    """Of models that answer in text the predicting tokens' states are compared."""
    return Compared(first=False) if states else None
