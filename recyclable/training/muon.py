"""Keeps deepspeed's Muon, which no run here uses, from loading torch's compiler: a second of every rank's start."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

_MODULE = "deepspeed.runtime.zero.muon.original_muon"
"""Compiles functions as it is imported, and is imported by every engine, to tell whether an optimizer is Muon."""


def import_muon() -> None:
    """Import it once, its functions to be compiled when they are called."""
    with patch.object(torch, "compile", _when_called):
        import_module(_MODULE)


def _when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        return torch.compile(function)(*args, **kwargs)  # torch knows by its code what it has compiled

    return compiled
