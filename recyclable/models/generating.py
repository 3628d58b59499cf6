"""A base, plain or with adapted weights on it, as a model that generates text."""

from __future__ import annotations

from torch import nn

from recyclable.carrying.carried import Carried
from recyclable.errors import InputError
from recyclable.models.language import language_model, require_generates
from recyclable.models.tasks import outdated_model
from recyclable.tasks.parts.task import task_of
from recyclable.weights.base import Base


def generating_model(base: Base) -> nn.Module:
    """The base with its own language-model head, unread; InputError where it has none or generates nothing."""
    require_generates(base)
    head = "Seq2SeqLM" if base.config.is_encoder_decoder else "CausalLM"
    model, missing = language_model(base, head, seed=0, dropout=None)
    if missing:
        problem = f"lacks {', '.join(missing)}, the head that generates text: expected a base that has one"
        raise InputError(base.folder, f"{problem} (pretrain makes it)")
    return model


def tuned_generating_model(carried: Carried) -> nn.Module:
    """The new base with adapted weights on it, unread; InputError where they answer with anything but text."""
    require_generates(carried.new)
    manifest = carried.weights.manifest
    task = task_of(manifest.task)
    if not task.kind.over_vocabulary:
        problem = f"was tuned for {task.kind.name}, whose head generates no text: expected weights tuned for generation"
        raise InputError(carried.weights.folder, problem)
    return outdated_model(carried, task, manifest.settings["seed"])
