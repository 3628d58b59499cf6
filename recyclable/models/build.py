"""Builds a base's model unread: its structure on the meta device, and for each parameter where its values come from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from recyclable.architectures.dropout import require_dropout, set_dropout
from recyclable.architectures.names import canonical_name, model_prefix
from recyclable.architectures.structure import saved_buffers
from recyclable.errors import InputError
from recyclable.models.large import LargeOnMeta
from recyclable.weights.base import Base, reason
from recyclable.weights.sources import Read, drawn, set_source

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
OtherShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Parameter -> the shape that the files have and the one that the model has."""


def auto_class(name: str) -> Any:
    """transformers' class that makes a model of any family for a kind of task, e.g. `SequenceClassification`."""
    return getattr(transformers, f"AutoModelFor{name}")


def structure(config: PretrainedConfig, auto: Any, architecture: str | None = None) -> PreTrainedModel:
    """A model without weights, in evaluation mode, as `from_pretrained` makes it; named in `config.architectures`.

    Its parameters are fp32 on the meta device, its buffers are real.

    Args:
        auto: as `auto_class` gives it.
        architecture: a class of transformers for this config, instead of the one that `auto` finds.
    """
    if architecture is None:
        make = partial(auto.from_config, trust_remote_code=False)
    else:
        found: Any = getattr(transformers, architecture, None)
        is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
        if not (is_model and found.config_class is type(config)):
            raise InputError("architecture", f"found {architecture!r}, no model of type {config.model_type!r}")
        make = found._from_config
    try:
        with init_empty_weights(include_buffers=False), no_init_weights(), LargeOnMeta():
            model = make(config, dtype=torch.float32)
    except Exception as error:  # whatever a family makes of its config
        raise InputError("config.json", f"makes no model: {reason(error)}") from error
    model.tie_weights()  # putting parameters on the meta device has parted them
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0  # changes no value, and fails at lengths that it does not divide
    config.architectures = [type(model).__name__]
    return model.eval()


def unread(
    auto: Any, base: Base, config: PretrainedConfig, dropout: float | None = None
) -> tuple[PreTrainedModel, list[str], OtherShapes]:
    """A model whose parameters start from the base's files.

    Args:
        dropout: the rate of every dropout of the trained model; None leaves the base's. InputError where one keeps its
            own.

    Returns it with the names of the parameters that the files lack, and of those that they have in another shape
    (found, wanted); both only outside the backbone, else it is an InputError.
    """
    try:
        model = structure(_with_dropout(config, dropout), auto)
    except ValueError as error:
        raise InputError(base.folder, f"cannot be loaded as {auto.__name__}: {error}") from error
    if dropout is not None:
        require_dropout(model, dropout)
    return model, *start_from_base(model, base)


def start_from_base(model: PreTrainedModel, base: Base) -> tuple[list[str], OtherShapes]:
    """Make a structure's parameters start from the base's files, and give its buffers the values they have there.

    Returns the names of the parameters that the files lack, and of those that they have in another shape, as `unread`.
    """
    _part(model, base)
    files = base.source
    stored_name = {canonical_name(stored, base.prefix): stored for stored in files.names}
    missing: list[str] = []
    other_shape: OtherShapes = {}
    for names in _tied_names(model):
        parameter, wanted = model.get_parameter(names[0]), tuple(model.get_parameter(names[0]).shape)
        found = [c for c in (canonical_name(name, base.prefix) for name in names) if c in stored_name]
        if not found:
            missing.append(names[0])
        elif files.shape(stored_name[found[0]]) != wanted:
            other_shape[names[0]] = (files.shape(stored_name[found[0]]), wanted)
        else:
            reads: list[Read] = [
                partial(base.hashed.read, c) if c in base else partial(files.read, stored_name[c]) for c in found
            ]
            set_source(parameter, reads[0] if len(reads) == 1 else partial(_equal, base.folder, found, reads))
    backbone = [n for n in sorted([*missing, *other_shape]) if n.startswith(f"{model.base_model_prefix}.")]
    backbone = [n for n in backbone if ".pooler." not in n]
    if backbone:
        raise base.lacks(backbone)
    for name, buffer in saved_buffers(model).items():
        if (canonical := canonical_name(name, base.prefix)) in stored_name:
            owner, _, own_name = name.rpartition(".")
            if buffer.is_meta:  # made of a parameter
                model.get_submodule(owner)._buffers[own_name] = buffer = torch.empty_like(buffer, device="cpu")
            buffer.copy_(files[stored_name[canonical]])
    if unknown := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise InputError(base.folder, f"lacks {', '.join(unknown)}, which {type(model).__name__} makes of its weights")
    return sorted(missing), other_shape


def _part(model: PreTrainedModel, base: Base) -> None:
    """Give the output embedding values of its own where the base has them, though the model's class ties it."""
    last = model.get_output_embeddings()
    if base.structure.parted and last is not None and last.weight is model.get_input_embeddings().weight:
        last.weight = nn.Parameter(torch.empty_like(last.weight))


def start_all(model: PreTrainedModel, base: Base, seed: int) -> None:
    """As `start_from_base`; what the base lacks, or has in another shape, is drawn."""
    missing, other_shape = start_from_base(model, base)
    draw(model, [*missing, *other_shape], seed)


def draw(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Fresh values for these parameters, from seed and name alone."""
    std = getattr(model.config, "initializer_range", 0.02)
    for name in names:
        parameter = model.get_parameter(name)
        set_source(parameter, drawn(seed, canonical_name(name, model_prefix(model.config)), parameter.shape, std))


def _with_dropout(config: PretrainedConfig, dropout: float | None) -> PretrainedConfig:
    """The config with this rate for every dropout; None leaves it as it is. Raises InputError where it cannot be."""
    if dropout is not None:
        set_dropout(config, dropout)
    return config


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _equal(folder: Path, names: list[str], reads: list[Read], start: int, stop: int) -> torch.Tensor:
    """A tied parameter that the files hold several times."""
    first = reads[0](start, stop)
    for name, read in zip(names[1:], reads[1:], strict=True):
        if not torch.equal(read(start, stop), first):
            raise InputError(folder, f"its config ties {name} to {names[0]}, but its files hold different values")
    return first
