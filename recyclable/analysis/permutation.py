"""Which neuron and which head of one base is which of another: permutation alignment by weight matching.

Ainsworth et al. 2022, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (arXiv 2209.04836, section 3.2): the
permutation that makes weights most alike is a linear assignment problem. For bases that are not related by training.
Within a transformer's layer the neurons of the feed-forward network and the attention heads can change places without
changing what the model computes. The residual stream, which all layers share, is left alone, so each set is its own
problem and is solved exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.differences import Differences, Permuted

# Of each set of a layer: tensors whose rows are its units, and tensors whose columns are.
_HEADS = {
    "attention.self": (r"attention\.self\.(?:query|key|value)\.(?:weight|bias)", r"attention\.output\.dense\.weight"),
    "attention.q_lin": (r"attention\.(?:q|k|v)_lin\.(?:weight|bias)", r"attention\.out_lin\.weight"),
}
_NEURONS = {
    "intermediate": (r"intermediate\.dense\.(?:weight|bias)", r"output\.dense\.weight"),
    "ffn.lin1": (r"ffn\.lin1\.(?:weight|bias)", r"ffn\.lin2\.weight"),
}
_LAYER = re.compile(r"^(.*\blayer\.\d+)\.(.+)$")


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
    rows, columns = {}, {}
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
        alike = sum(
            _units(new[name], units.count, side) @ _units(old[name], units.count, side).T
            for names, side in ((units.rows, 0), (units.columns, 1))
            for name in names
        )
        found.append((units, linear_sum_assignment(alike.numpy(), maximize=True)[1]))
    return found


def _units(tensor: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """[count, numbers of a unit], fp64."""
    return tensor.double().movedim(side, 0).reshape(count, -1)


def interchangeable(base: Base) -> list[Units]:
    """Every layer's heads and neurons; InputError for an architecture whose names are not known here."""
    layers: dict[str, list[str]] = {}
    for name in base.names:
        if inside := _LAYER.match(name):
            layers.setdefault(inside[1], []).append(inside[2])
    found = []
    for layer, names in layers.items():
        for kinds, heads in ((_HEADS, True), (_NEURONS, False)):
            patterns = next((kinds[kind] for kind in kinds if any(name.startswith(kind) for name in names)), None)
            if patterns is None:
                raise InputError(
                    base.folder, f"is a {base.config.model_type}: its heads and neurons are not known here"
                )
            rows, columns = (_named(layer, names, pattern) for pattern in patterns)
            found.append(Units(rows, columns, base.config.num_attention_heads if heads else base.shape(rows[0])[0]))
    if not found:
        raise InputError(base.folder, f"is a {base.config.model_type}: its heads and neurons are not known here")
    return found


def _named(layer: str, names: Iterable[str], pattern: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{name}" for name in names if re.fullmatch(pattern, name))
