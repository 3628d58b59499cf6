"""Which modules an adapter goes on, as people name them: names, a regular expression, or every linear module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from recyclable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = "all-linear"
"""PEFT's word for every linear module (GPT-2's Conv1D among them) but the head's; a router is one as well."""
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


def require_targets(model: PreTrainedModel, targets: list[str] | str | None, field: str = "target_modules") -> None:
    """InputError where names match no module, where a pattern is one that PEFT's files may not have, or where "all"
    would be less: weights that lie in no module of their own, as experts that transformers keeps fused.

    PEFT says nothing as long as one of several names matches.
    """
    require_quick([targets] if isinstance(targets, str) else targets or (), field)
    if isinstance(targets, str) and targets.lower() == ALL:
        if fused := fused_weights(model):
            problem = f"is {ALL}, which leaves out {len(fused)} tensors that are no modules, such as {fused[0]}"
            raise InputError(field, f"{problem} (mixtures of experts): name the modules that it is to go on instead")
        return
    names, kind = [name for name, _ in model.named_modules()], type(model).__name__
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise InputError(field, f"is {targets!r}, which is the whole name of no module of a {kind}")
        return
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            fused = [name for name in fused_weights(model) if target in name.split(".")]
            hint = f" ({fused[0]} is a tensor, not a module)" if fused else ""
            raise InputError(field, f"has {target!r}, but the name of no module of a {kind} ends so{hint}")


def require_quick(patterns: Iterable[str], field: str) -> None:
    """InputError for what is no regular expression, or one that may take forever to match."""
    from recyclable.adapters.configs import may_take_forever

    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(field, f"{pattern!r} is no regular expression: {error}") from error
        if may_take_forever(pattern):
            raise InputError(field, f"{pattern!r} is a pattern that may take forever to match")


def fused_weights(model: PreTrainedModel) -> list[str]:
    """The parameters of more than two dimensions that are no convolution's: several matrices in one tensor."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and type(module).__name__ not in _CONVOLUTIONS
    ]
