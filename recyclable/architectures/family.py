"""The record of what a family's structure does not tell, found by model type in this one place.

A family is one module of this room that holds a `Family`; nothing else knows its name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from recyclable import architectures

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


class Interchangeable(NamedTuple):
    """Units of a layer that can change places without changing what it computes, by patterns of names in the layer."""

    rows: str
    """Tensors whose rows are the units."""
    columns: str
    """Tensors whose columns are."""


class WayThrough(NamedTuple):
    """Through a layer's attention, by names in the layer. All else in it does to each token the same by itself."""

    entry: tuple[str, ...]
    """The one module that the layer's input goes into on its way to the attention, whatever else it is used for; of
    these names the first that the layer has."""
    end: str
    """The attention's last projection, which has no other input."""
    query: str | None = None
    """The projection that makes the queries; None where it makes keys and values too."""


@dataclass(frozen=True)
class Family:
    """What models of these types have in common; what is left out is not known, or can be derived."""

    model_types: tuple[str, ...] = ()
    """As in config.json."""
    heads: Interchangeable | None = None
    """Attention heads, of which a layer has `num_attention_heads`."""
    neurons: Interchangeable | None = None
    """Neurons of the feed-forward network."""
    masked_head: Callable[[PreTrainedModel], tuple[Callable[[torch.Tensor], torch.Tensor], nn.Module]] | None = None
    """A masked language model -> what it does to the backbone's states before its last layer, and that layer."""
    way_through: WayThrough | None = None
    """Through a layer."""
    classifies_first: bool = False
    """Whether its sequence classifiers read the first token's state alone."""


def family_of(config: PretrainedConfig | None) -> Family:
    """The record for a config's model type; an empty one where there is none, or no config."""
    return _records().get(getattr(config, "model_type", ""), Family())


@cache
def _records() -> dict[str, Family]:
    modules = (import_module(f"{architectures.__name__}.{found.name}") for found in _room())
    records = {id(record): record for m in modules for record in vars(m).values() if isinstance(record, Family)}
    return {model_type: record for record in records.values() for model_type in record.model_types}


def _room() -> list[pkgutil.ModuleInfo]:
    return list(pkgutil.iter_modules(architectures.__path__))
