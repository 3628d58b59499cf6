"""What happens to a chunk's logits, in PyTorch: losses and gradient, few rows at a time so that they stay in cache."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from recyclable.kernels import tiling
from recyclable.kernels.chunked import LACKING, Logits
from recyclable.kernels.inputs import LossSettings

BLOCK = 2**19
"""Logits worked on at once by one thread: 2 MB, of which five copies fit into a last-level cache."""
SHARED_BLOCK = 2**22
"""The same for several, which wait for each other after each operation: long, when a core is busy elsewhere."""
_HAS = LACKING * 1e-10
"""Logits below this are those of tokens that the teacher lacks, whatever the temperature."""


def row_gradient(
    student: Logits,
    teacher: Logits | None,
    targets: torch.Tensor | None,
    settings: LossSettings,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `RowGradient`."""
    tokens, vocabulary = student.products.shape
    precise = torch.promote_types(student.products.dtype, torch.float32)
    losses = student.products.new_zeros(2, tokens, dtype=precise)
    size = max(1, (BLOCK if torch.get_num_threads() == 1 else SHARED_BLOCK) // vocabulary)
    for block in tiling.tiles(tokens, size):
        logits, slopes = _finish(student, block), []
        keep = None if targets is None else targets[block] != settings.ignore_index
        if targets is not None and keep is not None:
            loss, slope = _cross_entropy(logits, targets[block].where(keep, 0))
            losses[0, block] = loss * keep
            slopes.append(slope.mul_(settings.hard_weight * keep[:, None]))
        if teacher is not None:
            loss, slope, some = _divergence(logits, _finish(teacher, block), settings)
            counted = some if keep is None else some & keep
            losses[1, block] = loss * counted
            slopes.append(slope.mul_(settings.soft_weight * settings.temperature * counted[:, None]))
        if gradient is not None:
            gradient[block] = _through(student, logits, slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1]))
    return losses[0], losses[1]


def _finish(raw: Logits, block: slice) -> torch.Tensor:
    """The block's logits, in fp32 or more; where the products are, in their place."""
    logits = raw.products[block]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if raw.bias is not None:
        logits.add_(raw.bias)
    if raw.scale != 1:
        logits.mul_(raw.scale)
    return logits if raw.softcap is None else logits.div_(raw.softcap).tanh_().mul_(raw.softcap)


def _through(raw: Logits, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient with respect to the products, from that with respect to the logits."""
    if raw.softcap is not None:
        gradient = gradient.mul_(1 - (logits / raw.softcap).square_())
    return gradient if raw.scale == 1 else gradient.mul_(raw.scale)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [B] and their gradient [B, V]: softmax minus one-hot."""
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(1, targets[:, None]).squeeze(1)
    gradient = log_q.exp_()
    return loss, gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [B], gradient [B, Vs] with respect to student/T, and whether a row has a shared token [B].

    Overwrites the teacher's logits.
    """
    vocabulary = student.shape[1]
    student, teacher = student / settings.temperature, teacher.div_(settings.temperature)
    if teacher.shape[1] < vocabulary:
        teacher = pad(teacher, (0, vocabulary - teacher.shape[1]), value=LACKING)
    log_p = teacher.log_softmax(-1)
    if settings.divergence == "jensen_shannon":
        loss, gradient = _jensen_shannon(student.log_softmax(-1), log_p, settings.mixing)
        some = teacher.amax(-1) > _HAS
    elif settings.divergence == "forward":
        loss, gradient = _forward(student.log_softmax(-1), log_p)
        some = teacher.amax(-1) > _HAS
    else:
        shared = teacher[:, :vocabulary]
        log_q = student.masked_fill_(shared < _HAS, LACKING).log_softmax(-1)
        loss, gradient = _reverse(log_q, log_p[:, :vocabulary])
        some = shared.amax(-1) > _HAS
    return loss, gradient, some


def _forward(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p (log p - log q), gradient q - p."""
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(-1)
    return loss, log_q.exp_().sub_(p)


def _reverse(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """D = Σ q (log q - log p), gradient q (log q - log p - D)."""
    difference = log_q - log_p
    q = log_q.exp_()
    loss = (q * difference).sum(-1)
    return loss, difference.sub_(loss[:, None]).mul_(q)


def _jensen_shannon(log_q: torch.Tensor, log_p: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """β KL(p ‖ m) + (1-β) KL(q ‖ m), gradient (1-β) q (log q - log m - KL(q ‖ m)): that through m cancels.

    log p [B, Vt] may be wider than log q [B, Vs]: there m = β p.
    """
    vocabulary = log_q.shape[1]
    beyond = log_p[:, vocabulary:].exp().sum(-1) * -math.log(beta)
    log_p = log_p[:, :vocabulary]
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher_loss = (log_p.exp() * (log_p - log_m)).sum(-1) + beyond
    student_loss, gradient = _reverse(log_q, log_m)
    return beta * teacher_loss + (1 - beta) * student_loss, gradient.mul_(1 - beta)
