"""Operations whose result's shape depends on values, answered where there are none: by the largest there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ATEN = torch.ops.aten
_BY_MASK = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_, _ATEN._unsafe_index}


def _everything(mask: torch.Tensor) -> torch.Tensor:
    """Where a tensor is not zero [N, D]: everywhere."""
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.long, device=mask.device)


def _one(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The runs of like values, without places and counts: one, as of rows that are alike, which a plan's are."""
    none = values.new_empty(0, dtype=torch.long)
    return values.new_empty(1), none, none


_ANSWERS: dict[Any, Callable[[torch.Tensor], Any]] = {_ATEN.nonzero: _everything, _ATEN.unique_consecutive: _one}


def answer(packet: Any, args: tuple[Any, ...]) -> Any:
    """What such an operation makes of tensors without values; None for any other.

    Masks choose all that they are about: a word per token for a tagger, every token where a model looks for the last
    one. That is the most that a run may hold.
    """
    made = _ANSWERS.get(packet)
    return None if made is None else made(args[0])


def without_masks(packet: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The arguments of an operation, with indices in place of the masks that it chooses by; and those indices."""
    if packet not in _BY_MASK or not any(_is_mask(index) for index in args[1]):
        return args, []
    tensor, indices, *others = args
    places = [_everything(index).unbind(1) if _is_mask(index) else (index,) for index in indices]
    made = [place for index, several in zip(indices, places, strict=True) if _is_mask(index) for place in several]
    return (tensor, [place for several in places for place in several], *others), made


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
