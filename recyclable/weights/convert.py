"""Tuned elsewhere, as data: a checkpoint taken apart into base and head, a codec's loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from recyclable.architectures.names import canonical_name, model_prefix
from recyclable.architectures.structure import saved_buffers
from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged, Renamed, Stored, TensorFiles
from recyclable.weights.delta import Delta
from recyclable.weights.digest import element_pieces, in_threads
from recyclable.weights.layouts import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Places:
    """What an architecture has a place for, by canonical names."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter."""
    backbone: frozenset[str]
    """Parameters that a base must have."""
    aliases: frozenset[str] = frozenset()
    """Tied parameters that are stored under another name."""
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What is saved beside the parameters, which no training moves; with the values it is made with."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Places:
        """Those of a model of any kind."""

        def named(found: Iterable[tuple[str, Any]]) -> dict[str, Any]:
            return {canonical_name(name, prefix): tensor for name, tensor in found}

        prefix = model_prefix(model.config)
        shapes = {name: tuple(p.shape) for name, p in named(model.named_parameters()).items()}
        every = named(model.named_parameters(remove_duplicate=False))
        backbone = (name for name, _ in model.base_model.named_parameters() if not name.startswith("pooler."))
        buffers = named(saved_buffers(model).items())
        return cls(shapes, frozenset(backbone), frozenset(every) - shapes.keys(), buffers)


def split(
    tuned: TensorFiles | ModelFiles,
    base: Base,
    places: Places,
    of_base: Places | None = None,
    tokens: int | None = None,
) -> tuple[Ranged, Renamed]:
    """A checkpoint's tensors that the base has, and those that it lacks (the head); by canonical name.

    Embeddings may have other numbers of rows than the base's where no token is in the others (padding): they come with
    the base's rows, the base's own values where the checkpoint has none.

    Args:
        places: of the checkpoint's architecture.
        of_base: of the same with the base's config (None: the same); what it has none for may stay behind, as the
            decoder of a base whose encoder alone is tuned.
        tokens: how many rows the tokens of the checkpoint's tokenizer take; None where that is not known.

    Raises InputError that lists every tensor that is missing, has no place, or is of another shape than the base's.
    """
    names: dict[str, str] = {}
    shapes, wanted = places.shapes, of_base or places
    lacking = sorted(places.backbone - set(base.names))
    problems = [f"the base lacks {n}" for n in lacking]
    homeless = sorted(set(base.names) & wanted.shapes.keys() - shapes.keys())
    problems += [f"the base's {n} has no place in the architecture" for n in homeless]
    for stored in tuned.names:
        name = canonical_name(stored, base.prefix)
        if name in names:
            problems.append(f"{stored} and {names[name]} are the same tensor's")
        elif name in shapes:
            names[name] = stored
        elif name in places.buffers:
            if not torch.equal(tuned[stored], base[name] if name in base else places.buffers[name]):
                problems.append(f"{stored} is not the base's, and no training moves it")
        elif name not in places.aliases and not base.structure.is_leftover(name):
            problems.append(f"{stored} has no place in the architecture")
    problems += [f"{name} is missing" for name in sorted(shapes.keys() - names.keys())]
    for name, stored in sorted(names.items()):
        found, owner = tuned.shape(stored), "the base's" if name in base else "the architecture's"
        expected = base.shape(name) if name in base else shapes[name]
        by_token = name in base and name in base.structure.vocabulary and found[1:] == expected[1:]
        if found == expected or (by_token and tokens is not None and tokens <= min(found[0], expected[0])):
            if found != shapes[name]:
                problems.append(f"{stored} is {found}, by its own config {shapes[name]}")
            continue
        if by_token:
            said = "with no tokenizer that says which of them have tokens" if tokens is None else f"for {tokens} tokens"
            problems.append(f"{stored} has {found[0]} rows, {owner} {expected[0]}, {said}")
        else:
            problems.append(f"{stored} is {found}, {owner} {expected}")
    if problems:
        raise InputError(tuned.folder, f"is no tuned form of {base.folder}: {'; '.join(problems)}")
    body = _WithRows(Renamed(tuned, {n: stored for n, stored in names.items() if n in base}), base)
    return body, Renamed(tuned, {n: stored for n, stored in names.items() if n not in base})


class _WithRows(Ranged):
    """A checkpoint's tensors with the base's numbers of rows: what is beyond them left out, the base's own added."""

    def __init__(self, tuned: Renamed, base: Base) -> None:
        self.tuned, self.base = tuned, base

    @property
    def names(self) -> list[str]:
        """The checkpoint's."""
        return self.tuned.names

    def stored(self, name: str) -> Stored:
        """Dtype of the checkpoint's tensor, shape of the base's."""
        return replace(self.tuned.stored(name), shape=self.base.shape(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in the checkpoint's dtype."""
        stored = self.tuned.stored(name)
        stop, end = self.stored(name).numel if stop is None else stop, stored.numel
        own = self.tuned.read(name, min(start, end), min(stop, end))
        return own if stop <= end else torch.cat([own, self.base.read(name, max(start, end), stop).to(stored.dtype)])


class Restored(Ranged):
    """The tuned tensors that a delta stands for, on the very base it was made from."""

    def __init__(self, delta: Delta, base: Base) -> None:
        self.delta, self.base = delta, base

    @property
    def names(self) -> list[str]:
        """The delta's."""
        return self.delta.names

    def stored(self, name: str) -> Stored:
        """Dtype and shape of the tuned tensor; it lies nowhere."""
        return Stored(self.delta.tuned_dtype(name), self.delta.shape(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tuned tensor, in its dtype."""
        return self.delta.restore(name, self.base.read(name, start, stop), start, stop)


def loss(delta: Delta, tuned: Ranged, base: Base) -> dict[str, float]:
    """What a codec lost: norm of (restored - tuned) over the norm of the tuned weights, and over their difference's.

    Norms are over all tensors of the delta, summed in float64. Elements that are equal, infinities too, lost nothing.
    """

    def squares(task: tuple[str, int, int]) -> torch.Tensor:
        name, start, stop = task
        from_base, want = base.read(*task), tuned.read(*task)
        got = delta.restore(name, from_base, start, stop).double()
        want, from_base = want.double(), from_base.double()
        same = (got == want) | (got.isnan() & want.isnan())
        wrong = torch.where(same, 0.0, got - want)
        return torch.stack([wrong.square().sum(), want.square().sum(), (want - from_base).square().sum()])

    pieces = in_threads(squares, element_pieces({name: delta.shape(name) for name in delta.names}))
    wrong, whole, moved = torch.stack([torch.zeros(3, dtype=torch.float64), *pieces]).sum(0).sqrt().tolist()
    return {"weights": _share(wrong, whole), "difference": _share(wrong, moved)}


def _share(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf
