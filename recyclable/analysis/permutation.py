"""Which neuron and which head of one base is which of another: permutation alignment by weight matching.

Ainsworth et al. 2022, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (arXiv 2209.04836, section 3.2): the
permutation that makes weights most alike is a linear assignment problem. For bases that are not related by training.
Within a transformer's layer the neurons of the feed-forward network and the attention heads can change places without
changing what the model computes. The residual stream, which all layers share, is left alone, so each set is its own
problem and is solved exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from recyclable.architectures.family import Interchangeable, family_of
from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.differences import Differences, Permuted

_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")


@dataclass(frozen=True)
class Units:
    """Interchangeable units of one layer: tensors that have them as rows, and as columns."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    count: int
    """Heads, or neurons."""


def align(differences: Differences, old: Base, new: Base) -> Permuted:
    """Differences of the old base with each neuron and head where the new base has the one that is most like it.

    Raises InputError for architectures that are not known here, and for bases of other shapes.
    """
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for units, order in match(old, new):
        for names, places in ((units.rows, rows), (units.columns, columns)):
            for name in names:
                size = new.shape(name)[0 if places is rows else 1] // units.count
                places[name] = (order[:, None] * size + np.arange(size)).reshape(-1)
    return Permuted(differences, rows, columns)


def match(old: Base, new: Base) -> list[tuple[Units, np.ndarray]]:
    """For each set of units the old base's unit that stands for each of the new base's, int64 [count]."""
    found = []
    for units in interchangeable(new):
        for name in (*units.rows, *units.columns):
            if name not in old or old.shape(name) != new.shape(name):
                shape = old.shape(name) if name in old else "missing"
                raise InputError(old.folder, f"{name} is {shape}, in {new.folder} {new.shape(name)}: cannot be aligned")
        products = (
            _units(new[name], units.count, side) @ _units(old[name], units.count, side).T
            for names, side in ((units.rows, 0), (units.columns, 1))
            for name in names
        )
        alike = sum(products, torch.zeros(units.count, units.count, dtype=torch.float64))
        found.append((units, linear_sum_assignment(alike.numpy(), maximize=True)[1]))
    return found


def _units(tensor: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """[count, numbers of a unit], fp64."""
    return tensor.double().movedim(side, 0).reshape(count, -1)


def interchangeable(base: Base) -> list[Units]:
    """Every layer's heads and neurons; InputError for a family of which they are not known."""
    family = family_of(base.config)
    layers: dict[str, list[str]] = {}
    for name in base.names:
        if inside := _LAYER.match(name):
            layers.setdefault(inside[1], []).append(inside[2])
    found = [
        _units_of(base, layer, names, kind, base.config.num_attention_heads if kind is family.heads else None)
        for layer, names in layers.items()
        for kind in (family.heads, family.neurons)
        if kind is not None
    ]
    if not found:
        raise InputError(base.folder, f"is a {base.config.model_type}: its heads and neurons are not known here")
    return found


def _units_of(base: Base, layer: str, names: list[str], kind: Interchangeable, count: int | None) -> Units:
    """A layer's units of one kind; as many as there are rows unless `count` says otherwise."""
    rows, columns = (tuple(f"{layer}.{n}" for n in names if re.fullmatch(pattern, n)) for pattern in kind)
    if not rows or not columns:
        raise InputError(base.folder, f"its {layer} has not the names of a {base.config.model_type}'s")
    return Units(rows, columns, count or base.shape(rows[0])[0])
