"""Fused losses on large vocabularies: cross-entropy and distillation from hidden states, without all tokens' logits."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from recyclable.kernels.chunked import RowGradient, chunked_loss
from recyclable.kernels.inputs import (
    DIVERGENCES,
    Head,
    LossSettings,
    LossSums,
    Taught,
    TaughtLogits,
    TaughtStates,
    TaughtTopK,
)
from recyclable.kernels.per_token import token_losses as _token_losses
from recyclable.kernels.reference import loss_of_logits, reference_loss
from recyclable.kernels.rows import row_gradient

__all__ = [
    "DIVERGENCES",
    "Head",
    "LossSettings",
    "LossSums",
    "Taught",
    "TaughtLogits",
    "TaughtStates",
    "TaughtTopK",
    "distillation_loss",
    "loss_of_logits",
    "reference_loss",
    "token_losses",
]


def distillation_loss(
    hidden: torch.Tensor,
    head: Head,
    teacher: Taught | None,
    targets: torch.Tensor | None,
    settings: LossSettings,
    positions: torch.Tensor | None = None,
) -> LossSums:
    """Cross-entropy and divergence from a teacher, as sums over tokens; nothing waits for the device.

    Rows are computed by Triton on CUDA where it is installed, else by PyTorch; both chunk by chunk of tokens.
    What is meant where the vocabularies differ is said at `reference_loss`.

    Args:
        hidden: student's states [..., H] before the head, fp32, fp64, bf16 or fp16; flattened to tokens.
        head: the student's; `weight` and `bias` get gradients unless frozen.
        teacher: None for cross-entropy alone. It gets no gradient.
        targets: token ids [M] (int64), or None for the divergence alone.
        positions: the M tokens to learn from, as indices into the flattened `hidden` and an online teacher's
            `hidden`; None takes all. Targets and cached teachers hold the M tokens in this order.

    Returns:
        Sums; only `loss` carries a gradient, and only once (no second derivative).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return chunked_loss(hidden, head, teacher, targets, settings, positions, _rows_for(hidden))


def token_losses(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [M] (fp32; fp64 of fp64) of states [M, H] against targets [M], without gradient; computed as
    `distillation_loss` is."""
    return _token_losses(hidden, head, targets, _rows_for(hidden))


def _rows_for(hidden: torch.Tensor) -> RowGradient:
    if hidden.is_cuda and hidden.dtype != torch.float64 and find_spec("triton") is not None:
        from recyclable.kernels.fused import row_gradient as fused

        return fused
    return row_gradient
