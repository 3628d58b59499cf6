"""Which parameter of a model each tensor of a base or of an adapter's file belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.func import functional_call

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


def saved_tensors(model: PeftModel, trained: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Name in PEFT's file -> tensor, of everything that PEFT saves.

    The model's own parameters and buffers where they are saved as they are, else what PEFT computes from them.

    Args:
        trained: values to save in the place of parameters', by the names that those have in the model.
    """
    config, tensors = model.peft_config["default"], model.state_dict(keep_vars=True)
    if trained is not None:
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}  # shared ones have several
        tensors = {name: trained.get(name_of.get(id(tensor), ""), tensor) for name, tensor in tensors.items()}
    # Prompts are asked for as they are, not to be computed anew, and AdaLoRA's modules have their final ranks already.
    with patch.multiple(config, create=True, inference_mode=True, rank_pattern=None):
        saved = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    if getattr(config, "prefix_projection", False) and not config.inference_mode:
        saved = {**saved, "prompt_embeddings": _projected(model, trained)}
    return {name: tensor for name, tensor in saved.items() if ".original_module." not in name}  # computes nothing


def _projected(model: PeftModel, trained: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """What a network that makes prefixes made last: it is not saved itself. Without its values, a stand-in."""
    encoder: Any = model.get_submodule("prompt_encoder.default")
    config = model.peft_config["default"]
    if trained is None:
        return torch.empty(config.num_virtual_tokens, encoder.transform[-1].out_features, device="meta")
    values = {name: trained[f"prompt_encoder.default.{name}"] for name, _ in encoder.named_parameters()}
    tokens = model.prompt_tokens["default"][None, : config.num_virtual_tokens]
    return functional_call(encoder, values, (tokens,))[0].detach()


def load(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model that has values those of an adapter's file, by PEFT; what is not among them stays as it is."""
    present = {name: tensor.detach() for name, tensor in saved_tensors(model).items()}
    with patch.object(model.peft_config["default"], "rank_pattern", None, create=True):  # as in `saved_tensors`
        set_peft_model_state_dict(model, {**present, **tensors})


def adapter_parameters(model: PeftModel, names: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Name in PEFT's file -> parameter, of everything that PEFT saves and that is one of the model's parameters.

    Args:
        names: in a file; those of the base's own parameters, which PEFT may save as well, belong to these.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    identities = {id(parameter) for parameter in own.values()}
    saved = {n: t for n, t in saved_tensors(model).items() if isinstance(t, nn.Parameter) and id(t) in identities}
    return {**{name: own[name] for name in names if name in own}, **saved}


def only_parameters(model: PeftModel) -> bool:
    """Whether PEFT saves parameters and nothing else."""
    return adapter_parameters(model).keys() == saved_tensors(model).keys()


def adapter_shapes(model: PeftModel, names: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Name in PEFT's file -> shape, of everything that PEFT saves.

    Args:
        names: as for `adapter_parameters`.
    """
    tensors = {**saved_tensors(model), **adapter_parameters(model, names)}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
