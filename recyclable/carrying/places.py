"""Which parameter of a model each tensor of a base or of an adapter's file belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from recyclable.architectures.names import canonical_name, model_prefix
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import ADAPTER

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of the model it wraps."""
_WRAPPING = frozenset({"base_layer", "original_module", "modules_to_save", "ln_tuning_layers", "token_adapter"})
"""What PEFT puts between a module's name and those of tensors that take the place of the module's own."""


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Canonical name -> the model's parameter name, for plain and PEFT models; tied parameters once."""
    prefix = model_prefix(model.config)
    return {canonical_name(name.removeprefix(PEFT_PREFIX), prefix): name for name, _ in model.named_parameters()}


def adapter_base_name(name: str, base: Base) -> str:
    """The canonical name that a tensor of a PEFT adapter's file would have in the base."""
    inside = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else "base_model."  # prompts stand beside the model
    plain = canonical_name(name.removeprefix(inside), base.prefix)
    return plain if plain in base else ".".join(part for part in plain.split(".") if part not in _WRAPPING)


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Name in PEFT's file -> parameter, of everything that PEFT saves."""
    parameters = dict(model.named_parameters())
    saved = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    if "prompt_embeddings" in saved:  # computed, not taken from the parameters that were given
        saved["prompt_embeddings"] = model.get_parameter("prompt_encoder.default.embedding.weight")
    return saved


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Name in PEFT's file -> shape, of everything that PEFT saves."""
    for encoder in getattr(model, "prompt_encoder", {}).values():
        if any(parameter.is_meta for parameter in encoder.parameters()):
            encoder.to_empty(device="cpu")  # its file holds what it computes
    return {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}


def label_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules beside the backbone by name, in plain and PEFT models: they alone know of the task's labels."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    children = ((name, child) for name, child in model.named_children() if child is not model.base_model)
    return {name: child for name, child in children if any(True for _ in child.parameters())}


def adapter_head(model: nn.Module, weights: AdaptedWeights, base: Base) -> set[str]:
    """Names in PEFT's file of an adapter's tensors that belong to the task's head."""
    heads = {*label_heads(model), "pooler"}
    return {n for n in weights.file(ADAPTER).names if adapter_base_name(n, base).partition(".")[0] in heads}


def require_same(where: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """InputError that lists every tensor (name -> shape) that is missing, left over or of another shape."""
    problems = [f"{n} is missing" for n in wanted.keys() - found.keys()]
    problems += [f"{n} has no place in the model" for n in found.keys() - wanted.keys()]
    other = [n for n in found.keys() & wanted if found[n] != wanted[n]]
    problems += [f"{n} is {found[n]}, the model's is {wanted[n]}" for n in other]
    if problems:
        raise InputError(where, f"does not fit the model: {'; '.join(sorted(problems))}")
