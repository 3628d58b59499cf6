"""Dropout in any family: every rate of a config is set, and a model is checked to have it everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import PretrainedConfig

from recyclable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_dropout(name: str, value: object) -> bool:
    """Whether a config's field or a module's attribute is a dropout rate; layerdrop is something else."""
    named = "dropout" in name or name.endswith("pdrop")
    return named and not isinstance(value, bool) and (value is None or isinstance(value, int | float))


def set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Replace every dropout rate of a config, those of the configs in it as well; InputError where it cannot be."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            set_dropout(value, rate)
        elif is_dropout(name, value) and value != rate:
            try:
                setattr(config, name, rate)
            except Exception as error:  # MPT's config wants whole numbers
                raise InputError("dropout", f"is {rate}, which {type(config).__name__}.{name} cannot be") from error


def require_dropout(model: PreTrainedModel, rate: float) -> None:
    """InputError when a dropout of the model has another rate: one that no field of its config sets."""
    found = {place: value for name, module in model.named_modules() for place, value in _rates(name, module)}
    if rate and not found:
        raise InputError("dropout", f"is {rate}, but a {model.config.model_type} has no dropout")
    for place, value in found.items():
        if value != rate:
            raise InputError("dropout", f"is {rate}, but in a {model.config.model_type} {place} keeps {value}")


def _rates(name: str, module: nn.Module) -> Iterator[tuple[str, float]]:
    """(where, rate) of what a module drops itself: by a module of its own or by a function in its forward."""
    if "Dropout" in type(module).__name__:
        yield from ((name, getattr(module, own)) for own in ("p", "drop_prob") if hasattr(module, own))
        return
    for attribute, value in vars(module).items():
        if value is not None and is_dropout(attribute, value):
            yield f"{name}.{attribute}".lstrip("."), value
