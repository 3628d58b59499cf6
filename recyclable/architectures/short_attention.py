"""Attention over few keys on a CPU in bf16: two products and a softmax, faster than torch's fused kernel there.

That kernel's backward pass takes several times as long as its forward pass where keys are few; what these keep is small
then (benchmarks/cpu_attention.py). Scores are rounded to bf16, as in transformers' eager attention.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa"
"""Which of transformers' computes so."""
_MARK = "few_keys_written_out"
"""What modules have, on themselves, that may compute so."""
_FEW = 256
_ELSEWHERE = ("position_bias", "cache", "softcap")
"""Arguments that are left to transformers."""


def write_out(model: nn.Module, few: bool) -> None:
    """Whether a model computes so where keys are `few`: by shape, precision and device of each call alone."""
    install()
    for module in model.modules():
        setattr(module, _MARK, few)


def is_short(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether these are written out.

    Args:
        query: [B, N, L, D]
        key: [B, M, K, D]
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= _FEW


@cache
def install() -> None:
    """Have transformers' sdpa ask; what narrows its queries is installed over it (`last_attention`)."""
    ALL_ATTENTION_FUNCTIONS[_NAME] = partial(_attend, ALL_ATTENTION_FUNCTIONS[_NAME])


def _attend(
    fused: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """[B, L, N, D], as transformers' functions of attention have it."""
    unusual = any(kwargs.get(name) is not None for name in _ELSEWHERE)
    if unusual or not (getattr(module, _MARK, False) and is_short(query, key)):
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return fused(module, query, key, value, attention_mask, **given)
    if (
        attention_mask is None
        and query.shape[-2] > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        attention_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return written_out(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention [B, N, L, D] of queries [B, N, L, D], keys and values [B, M, K, D], N a multiple of M.

    Args:
        mask: [B or 1, N or 1, L, K]; true where a key is seen, or what is added to the scores.
        scaling: of the scores; None: one over the root of D.
    """
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = (each.repeat_interleave(times, 1) for each in (key, value))
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # infinite, rows of padding had no sum
    elif mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ value
