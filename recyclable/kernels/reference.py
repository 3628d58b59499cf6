"""The distillation loss in plain PyTorch, all logits at once: what the other versions are tested against."""

from __future__ import annotations

import math

import torch

from recyclable.kernels.inputs import (
    Head,
    LossSettings,
    LossSums,
    Taught,
    TaughtLogits,
    TaughtStates,
    select,
    teacher_vocabulary,
)


def reference_loss(
    hidden: torch.Tensor,
    head: Head,
    teacher: Taught | None,
    targets: torch.Tensor | None,
    settings: LossSettings,
    positions: torch.Tensor | None = None,
) -> LossSums:
    """As `distillation_loss`; memory O(M V), gradients by autograd.

    Vocabularies of different size share their first tokens, and a token that one side lacks has probability zero there.
    KL(a ‖ b) is infinite where a has mass and b has none: there a is conditioned on the tokens of b, so that `forward`
    renormalises the teacher over the student's tokens and `reverse` the student over the teacher's. Jensen-Shannon is
    finite as it is. A token without any shared token adds nothing.
    """
    hidden, teacher = select(hidden, head, teacher, targets, positions)
    return loss_of_logits(head_logits(hidden, head), teacher, targets, settings)


def loss_of_logits(
    student: torch.Tensor, teacher: Taught | None, targets: torch.Tensor | None, settings: LossSettings
) -> LossSums:
    """As `reference_loss`, from the student's logits [M, Vs] in fp32 or fp64: for heads that are no linear layer."""
    valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    hard = soft = student.new_zeros(len(student))
    if targets is not None:
        valid = targets != settings.ignore_index
        hard = -student.log_softmax(-1).gather(1, targets.where(valid, 0)[:, None]).squeeze(1)
    if teacher is not None:
        soft = divergence(student, teacher_logits(teacher).to(student.dtype).detach(), settings)
    hard, soft = hard.where(valid, 0).sum(), soft.where(valid, 0).sum()
    loss = settings.hard_weight * hard + settings.soft_weight * settings.temperature**2 * soft
    return LossSums(loss, hard.detach(), soft.detach())


def head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits [M, V], at least in fp32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def teacher_logits(teacher: Taught) -> torch.Tensor:
    """Logits [M, Vt]; -inf where the teacher has no probability."""
    if isinstance(teacher, TaughtStates):
        return head_logits(teacher.hidden, teacher.head)
    if isinstance(teacher, TaughtLogits):
        return teacher.logits
    logits = teacher.values.new_full((len(teacher.values), teacher_vocabulary(teacher)), -math.inf)
    return logits.scatter(1, teacher.indices, teacher.values)


def divergence(student: torch.Tensor, teacher: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """Per token [M], from logits [M, Vs] and [M, Vt]."""
    union = max(student.shape[1], teacher.shape[1])
    student, teacher = (
        torch.nn.functional.pad(logits, (0, union - logits.shape[1]), value=-math.inf) / settings.temperature
        for logits in (student, teacher)
    )
    student_has, teacher_has = student > -math.inf, teacher > -math.inf
    if settings.divergence == "forward":
        teacher_has = teacher_has & student_has
    elif settings.divergence == "reverse":
        student_has = student_has & teacher_has
    some = student_has.any(1, keepdim=True) & teacher_has.any(1, keepdim=True)
    log_q, log_p = _log_softmax(student, student_has), _log_softmax(teacher, teacher_has)
    if settings.divergence == "forward":
        rows = _kl(log_p, log_q)
    elif settings.divergence == "reverse":
        rows = _kl(log_q, log_p)
    else:
        beta = settings.mixing
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return rows.where(some.squeeze(1), 0)


_NOTHING = -1e30
"""Log-probability of an impossible token: finite, so that 0 log 0 is 0 and has the gradient 0."""


def _log_softmax(logits: torch.Tensor, has: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~has, -math.inf).where(has.any(1, keepdim=True), 0).log_softmax(-1).clamp(min=_NOTHING)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """Σ a (log a - log b) with 0 log 0 = 0."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)
