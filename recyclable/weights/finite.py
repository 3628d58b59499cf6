"""Finds numbers that are none, NaN and infinity, in little more time than reading takes."""

from __future__ import annotations

import torch

_NARROW = 2  # bytes; of narrower floating point torch finds no extremes


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite numbers: both extremes are, as NaN is both extremes of whatever has one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor if tensor.itemsize >= _NARROW else tensor.float())
    return bool(torch.isfinite(low) & torch.isfinite(high))
