"""What the distillation losses take and return: heads, teachers, settings, sums; checked without reading the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

DIVERGENCES = ("forward", "reverse", "jensen_shannon")
LOGITS = ("fp32", "bf16")


@dataclass(frozen=True)
class Head:
    """A linear head: logits = cap(scale (h Wᵀ + b)), where cap(z) = softcap tanh(z / softcap) (Gemma 2, 2408.00118).

    Args:
        weight: [V, H], whole (under ZeRO-3: gathered).
        bias: [V] or None.
        scale: a model's logit scale (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: None leaves the logits as they are.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TaughtStates:
    """A teacher that runs beside the student: its last hidden states [..., Ht], token by token as the student's."""

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class TaughtLogits:
    """A teacher whose logits, or log-probabilities, [M, Vt] are known; -inf is a token that it lacks."""

    logits: torch.Tensor


@dataclass(frozen=True)
class TaughtTopK:
    """A teacher known by its k likeliest tokens: logits or log-probabilities [M, k] of `indices` [M, k] (int64).

    All other tokens have probability zero, and the k are renormalised. `vocabulary` is Vt.
    """

    values: torch.Tensor
    indices: torch.Tensor
    vocabulary: int


Taught = TaughtStates | TaughtLogits | TaughtTopK


@dataclass(frozen=True)
class LossSettings:
    """L = hard_weight CE(student, targets) + soft_weight T² D(teacher/T, student/T), summed over tokens.

    Args:
        divergence: `forward` is KL(teacher ‖ student), `reverse` KL(student ‖ teacher), `jensen_shannon` the
            generalised β KL(teacher ‖ m) + (1-β) KL(student ‖ m), m = β teacher + (1-β) student
            (Agarwal et al. 2024, arXiv 2306.13649).
        mixing: β, strictly between 0 and 1.
        temperature: T > 0; T² as in Hinton et al. 2015 (arXiv 1503.02531), section 2.
        ignore_index: tokens with this target add to neither term.
        logits: what a chunk's logits are written and read in where the states are bf16: `fp32`, or `bf16`, which
            rounds them as most losses do, takes less than half the memory, and gradients in their place. Normalisers,
            losses and gradients are found in fp32 all the same.
    """

    divergence: str = "forward"
    mixing: float = 0.5
    temperature: float = 1.0
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    ignore_index: int = -100
    logits: str = "fp32"

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: {self.divergence!r}, expected one of {', '.join(DIVERGENCES)}")
        if self.logits not in LOGITS:
            raise ValueError(f"logits: {self.logits!r}, expected one of {', '.join(LOGITS)}")
        if not 0 < self.mixing < 1:
            raise ValueError(f"mixing: {self.mixing}, expected more than 0 and less than 1 (the ends are the two KLs)")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}, expected more than 0")


class LossSums(NamedTuple):
    """Sums over tokens, in fp32 (fp64 for fp64 inputs); `batchmean` divides them by the number of valid tokens."""

    loss: torch.Tensor
    """hard_weight hard + soft_weight T² soft: the one that carries the gradient."""
    hard: torch.Tensor
    """Cross-entropy, without gradient."""
    soft: torch.Tensor
    """Divergence, without T² and without gradient."""


def select(
    hidden: torch.Tensor,
    head: Head,
    teacher: Taught | None,
    targets: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, Taught | None]:
    """The student's hidden states [M, H] at the positions, and the teacher at the same ones.

    Raises:
        ValueError: shapes do not fit; targets and teacher both missing.
    """
    hidden = _at(hidden, positions)
    if isinstance(teacher, TaughtStates):
        teacher = TaughtStates(_at(teacher.hidden, positions), teacher.head)
    tokens = len(hidden)
    _fits("student", hidden, head)
    if targets is None and teacher is None:
        raise ValueError("neither targets nor a teacher: nothing to learn from")
    if targets is not None and targets.shape != (tokens,):
        raise ValueError(f"targets: shape {list(targets.shape)}, expected [{tokens}], one per token")
    if isinstance(teacher, TaughtStates):
        _fits("teacher", teacher.hidden, teacher.head)
    elif isinstance(teacher, TaughtTopK) and teacher.values.shape != teacher.indices.shape:
        raise ValueError(
            f"teacher: values {list(teacher.values.shape)} and indices {list(teacher.indices.shape)} differ in shape"
        )
    if teacher is not None and teacher_rows(teacher) != tokens:
        raise ValueError(f"teacher: {teacher_rows(teacher)} tokens, expected {tokens}, one per token of the student")
    return hidden, teacher


def teacher_rows(teacher: Taught) -> int:
    """M, the number of tokens."""
    if isinstance(teacher, TaughtStates):
        return len(teacher.hidden)
    return len(teacher.logits if isinstance(teacher, TaughtLogits) else teacher.values)


def teacher_vocabulary(teacher: Taught) -> int:
    """Vt, the number of tokens that the teacher can say."""
    if isinstance(teacher, TaughtStates):
        return teacher.head.weight.shape[0]
    return teacher.vocabulary if isinstance(teacher, TaughtTopK) else teacher.logits.shape[1]


def _at(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    flat = hidden.flatten(0, -2)
    return flat if positions is None else flat.index_select(0, positions)


def _fits(whose: str, hidden: torch.Tensor, head: Head) -> None:
    if head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{whose} head weight: shape {list(head.weight.shape)}, expected [V, {hidden.shape[1]}] "
            "(a ZeRO-3 partition is empty: gather it first)"
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"{whose} head bias: shape {list(head.bias.shape)}, expected [{head.weight.shape[0]}]")
