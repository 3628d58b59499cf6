"""Where the sublayers of a model end: the projection back to the residual stream of each attention and feed-forward."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from recyclable.architectures.experts import fused_weights
from recyclable.architectures.layers import layer_lists


class End(NamedTuple):
    """The last linear module of a sublayer."""

    name: str
    """In the model."""
    inside: str
    """In its layer."""
    module: nn.Module
    attention: bool
    """Of an attention, not of a feed-forward network."""

    @property
    def linear(self) -> nn.Module:
        """The module without adapters."""
        return _plain(self.module)


def sublayer_ends(model: nn.Module) -> list[End]:
    """The ends of all sublayers in model order; none at all where a layer is not understood (mixtures of experts).

    In a layer, what lies within a module that is named an attention is one sublayer, what lies between two of them
    another; it ends in its last linear module that gives the residual stream's width.

    Args:
        model: of transformers; plain, or with an adapter on its linear modules.
    """
    config = getattr(model, "config", None)
    width = config.get_text_config().hidden_size if isinstance(config, PretrainedConfig) else None
    layers = ((f"{name}.{i}", layer) for name, stack in layer_lists(model).items() for i, layer in enumerate(stack))
    found = [list(_ends(name, layer, width)) for name, layer in layers]
    understood = all({end.attention for end in ends} == {True, False} for ends in found) and not fused_weights(model)
    return [end for ends in found for end in ends] if understood else []


def _ends(layer_name: str, layer: nn.Module, width: int | None) -> Iterator[End]:
    attentions = [name for name, module in layer.named_modules() if "Attention" in type(module).__name__]

    def attention(name: str) -> str:
        """The outermost attention that a module lies in; nothing for none."""
        return next((outer for outer in attentions if name.startswith(f"{outer}.")), "")

    for within, group in groupby(_linear(layer), key=lambda found: attention(found[0])):
        wide = [(name, module) for name, module in group if _widths(module)[1] == width]
        kinds = {(re.sub(r"\d+", "", owner), last) for owner, _, last in (name.rpartition(".") for name, _ in wide)}
        one_by_one = len(kinds) == len(wide)  # not several of a kind side by side: experts
        if wide and one_by_one and all(_widths(module)[0] == width for _, module in wide[:-1]):
            name, module = wide[-1]
            yield End(f"{layer_name}.{name}", name, module, bool(within))


def _linear(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear modules in order, adapted ones as they are wrapped."""
    found: list[str] = []
    for name, module in layer.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if not inside_another and isinstance(_plain(module), nn.Linear | Conv1D):
            found.append(name)
            yield name, module


def _widths(module: nn.Module) -> tuple[int, int]:
    """Of what goes in and of what comes out."""
    module = _plain(module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return module.nx, module.nf


def _plain(module: nn.Module) -> nn.Module:
    """The module that adapters are wrapped around."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def suffixes(model: nn.Module, ends: list[End]) -> list[str]:
    """What the modules' names end with, and no others': within their layers, or whole where that is not enough."""
    found = list(dict.fromkeys(end.inside for end in ends))
    wanted = {end.name for end in ends}
    matched = {name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{suffix}") for suffix in found)}
    return found if matched == wanted else sorted(wanted)
