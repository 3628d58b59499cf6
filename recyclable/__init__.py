"""Upgrade a base model by continual pre-training and bring everything tuned on the old one along."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recyclable.api import (
        Store,
        apply,
        carry,
        carry_tokenizer,
        evaluate,
        generate,
        plan,
        pretrain,
        probe,
        recycle,
        study,
        teacher_loss,
        tune,
    )

__all__ = ["Store", "apply", "carry", "carry_tokenizer", "evaluate", "generate", "plan", "pretrain", "probe"]
__all__ += ["recycle", "study", "teacher_loss", "tune"]


def __getattr__(name: str) -> Any:
    """The names above come from `recyclable.api` when they are first used: importing torch takes seconds."""
    if name in __all__:
        return getattr(import_module("recyclable.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
