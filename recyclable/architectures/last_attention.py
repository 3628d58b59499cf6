"""Attention whose queries are only those of the tokens that are read; all tokens' keys and values are there.

Shapes: B rows, L and K queries and keys of each, N heads, D their width, M read tokens, Q the most of any row.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recyclable.architectures import short_attention
from recyclable.architectures.read_tokens import Padded, read_tokens

_NAME = "sdpa"
"""Which of transformers' is narrowed."""
_MARK = "reads_few"
"""What an attention module has, on itself, that may compute so."""


def narrow(module: nn.Module) -> None:
    """Have an attention module of transformers' do so while its layer is read so; all others compute as ever."""
    setattr(module, _MARK, True)
    _install()


@cache
def _install() -> None:
    short_attention.install()  # computes with the queries that are left
    ALL_ATTENTION_FUNCTIONS[_NAME] = partial(_attend, ALL_ATTENTION_FUNCTIONS[_NAME])


def _attend(
    whole: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """[B, L, N, D] of queries [B, N, L, D], keys and values [B, N, K, D]; 0 where nobody reads."""
    # what others compute is compiled, and a compiler cannot follow where a context is asked
    read = read_tokens() if getattr(module, _MARK, False) else None
    causal = kwargs.get("is_causal")
    unsaid = attention_mask is None and (getattr(module, "is_causal", True) if causal is None else causal)
    if read is None or not read.attending or read.padded is None or unsaid or kwargs.get("position_bias") is not None:
        return whole(module, query, key, value, attention_mask, **kwargs)
    tokens, places = read.padded
    few = query.transpose(1, 2).flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
    mask = None if attention_mask is None else _of_queries(attention_mask, read.padded, query.shape[2])
    found, weights = whole(module, few.transpose(1, 2), key, value, mask, **kwargs)
    return read.spread(found.flatten(0, 1).index_select(0, places)[:, None]), weights


def _of_queries(mask: torch.Tensor, padded: Padded, length: int) -> torch.Tensor:
    """[B, N or 1, Q, K] of a mask [B or 1, N or 1, L, K]; one for all queries stays."""
    if mask.shape[2] == 1:
        return mask
    rows = torch.arange(len(padded.tokens), device=mask.device)[:, None]
    return mask.expand(len(rows), -1, -1, -1)[rows, :, padded.tokens % length].transpose(1, 2)
