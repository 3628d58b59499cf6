"""Puts outdated weights into a model of the new base: each parameter learns where its values come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from peft import PeftModel
from torch import nn

from recyclable.analysis import permutation
from recyclable.carrying.carried import Carried
from recyclable.carrying.changes import AS_THEY_ARE, Changes
from recyclable.carrying.places import (
    PEFT_PREFIX,
    adapter_parameters,
    adapter_shapes,
    canonical_names,
    label_heads,
    load,
    require_same,
)
from recyclable.carrying.starts import start, start_adapter, transformed
from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.differences import Aligned, Differences, require_alike
from recyclable.weights.manifest import HEAD
from recyclable.weights.sources import Read, set_source
from recyclable.weights.vocabulary import vocabulary_tensors


def differences_of(carried: Carried, changes: Changes = AS_THEY_ARE, seed: int = 0) -> Differences:
    """What outdated weights add to the new base: rows aligned by token, merged, thinned and scaled.

    A scale that is still to be found counts as 1.
    """
    if carried.weights.is_adapter:
        if changes.changes_start():
            hint = "is an adapter: scale, ties, dare, skip_embeddings, align change deltas"
            raise InputError(carried.weights.folder, hint)
        return carried.adapter_differences()
    return merged([carried], changes, seed)


def merged(several: Sequence[Carried], changes: Changes, seed: int) -> Differences:
    """The same of several deltas that go onto one base, summed or merged by TIES."""
    opened, new = [_aligned(carried, changes) for carried in several], several[0].new
    require_alike(opened, [carried.weights.folder for carried in several])
    left_out = vocabulary_tensors(new) if changes.skip_embeddings else frozenset()
    scale = changes.known_scale()
    return transformed(opened, left_out, scale=scale, ties=changes.ties, dare=changes.dare, seed=seed)


def _aligned(carried: Carried, changes: Changes) -> Differences:
    differences: Differences = carried.weights.delta
    if carried.rows is not None:
        differences = Aligned(differences, vocabulary_tensors(carried.new), carried.rows.old_row)
    return permutation.align(differences, carried.old, carried.new) if changes.align is not None else differences


class Placement:
    """Where outdated weights go in a model of the new base; found before the model is partitioned, good ever after.

    Args:
        differences: made from those of the weights.
        head: False leaves the model's own head for its labels as it is.

    Raises InputError that lists every tensor that is missing, left over or of another shape.
    """

    def __init__(self, model: nn.Module, carried: Carried, differences: Differences, head: bool = True) -> None:
        self._carried, weights = carried, carried.weights
        skipped = () if head else tuple(f"{name}." for name in label_heads(model))

        def kept(names: Iterable[str]) -> list[str]:
            return [name for name in names if not name.removeprefix(PEFT_PREFIX).startswith(skipped)]

        found = {name: differences.shape(name) for name in kept(differences.names)}
        if weights.is_adapter:
            assert isinstance(model, PeftModel), "a model for an adapter's weights has one as well"
            places, shapes = adapter_parameters(model, found), adapter_shapes(model, found)
            self._head: list[str] = []
        else:
            places = {name: model.get_parameter(own) for name, own in canonical_names(model).items()}
            shapes = {name: tuple(parameter.shape) for name, parameter in places.items()}
            self._head = kept(weights.file(HEAD).names)
            found.update({name: weights.file(HEAD).shape(name) for name in self._head})
        require_same(weights.folder, found, {name: shapes[name] for name in kept(shapes)})
        self._model, self._names = model, list(found)
        self._places = {name: places[name] for name in found if name in places}

    def put(self, differences: Differences) -> None:
        """Make the unread model start from the weights with these differences.

        An adapter with more to it than parameters is loaded now, by PEFT, into a model that has its values.
        """
        if self._places.keys() != set(self._names):
            assert isinstance(self._model, PeftModel)
            values, own = self._carried.new_values, self._carried.unmoved

            def whole(name: str) -> torch.Tensor:
                shape = torch.Size(differences.shape(name))
                return start_adapter(values, differences, name, 0, shape.numel(), own=own).view(shape)

            return load(self._model, {name: whole(name) for name in self._names})
        for parameter, read in self.reads(differences):
            set_source(parameter, read)

    def reads(self, differences: Differences) -> list[tuple[nn.Parameter, Read]]:
        """Each parameter that the weights have a value for, and where it comes from when these differences are added.

        `carrying.starts` has the arithmetic.
        """
        weights, new = self._carried.weights, self._carried.new.hashed
        if weights.is_adapter:
            values, own = self._carried.new_values, self._carried.unmoved
            return [(p, partial(start_adapter, values, differences, n, own=own)) for n, p in self._places.items()]
        how = {name: partial(weights.file(HEAD).read, name) for name in self._head}
        for name in self._places.keys() - how.keys():
            how[name] = partial(start, new, differences, name, dtype=torch.float32, own=self._carried.own)
        return [(parameter, how[name]) for name, parameter in self._places.items()]


def put(model: nn.Module, carried: Carried, differences: Differences, head: bool = True) -> None:
    """Make an unread model of the new base start from outdated weights; as `Placement`."""
    Placement(model, carried, differences, head).put(differences)


def start_from(model: nn.Module, tensors: Ranged, stored_name: Mapping[str, str]) -> None:
    """Make parameters start from tensors as they are.

    Args:
        stored_name: the model's name of each of these parameters -> its name among the tensors.
    """
    for name, stored in stored_name.items():
        set_source(model.get_parameter(name), partial(tensors.read, stored))
