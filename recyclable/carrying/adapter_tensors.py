"""Which tensors of an adapter's file are values of the base's own tensors, and which have an entry per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recyclable.carrying.places import adapter_base_name
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.algebra import flat_range
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged, Stored
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import Rows

_TRAINED_ROWS = "trainable_tokens_delta"
"""What PEFT calls rows of an embedding that take the place of the base's; it has values and no differences in them."""
_OF_ALL, _BY_MODULE = "token_indices", "trainable_token_indices"
"""The fields that say which rows these are: of a kind that is nothing but them, and of one that has them as well."""


@dataclass(frozen=True)
class Full:
    """What in the base a tensor of an adapter's file takes the place of."""

    base_name: str
    """The base's tensor."""
    rows: tuple[int, ...] | None = None
    """Which of its rows, in this order; None: all of it."""


class BaseValues(Ranged):
    """What a base has where an adapter's file holds values of its own, by the names in that file."""

    def __init__(self, base: Ranged, full: Mapping[str, Full]) -> None:
        self.base, self.full = base, full

    @property
    def names(self) -> list[str]:
        """Names in the adapter's file."""
        return list(self.full)

    def __contains__(self, name: str) -> bool:
        return name in self.full

    def stored(self, name: str) -> Stored:
        """Dtype and shape; chosen rows lie nowhere."""
        stored, rows = self.base.stored(self.full[name].base_name), self.full[name].rows
        return stored if rows is None else Stored(stored.dtype, (len(rows), *stored.shape[1:]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in the base's dtype."""
        base_name, rows = self.full[name].base_name, self.full[name].rows
        if rows is None:
            return self.base.read(base_name, start, stop)
        stored = self.stored(name)
        width = torch.Size(stored.shape[1:]).numel()

        def chosen(first: int, last: int) -> torch.Tensor:
            parts = [self.base.read(base_name, row * width, (row + 1) * width) for row in rows[first:last]]
            return torch.stack(parts) if parts else torch.empty(0, width, dtype=stored.dtype)

        return flat_range(chosen, width, start, stored.numel if stop is None else stop)


def taken_places(weights: AdaptedWeights, base: Base) -> dict[str, str]:
    """Name in an adapter's file -> the base's tensor that it has values of.

    Found by name: PEFT's own parts of it are taken out.
    """
    found = {}
    for name in weights.file(ADAPTER).names:
        plain = adapter_base_name(name, base)
        if plain.endswith(f".{_TRAINED_ROWS}"):
            plain = plain.removesuffix(_TRAINED_ROWS) + "weight"
        if (own := _stored_as(plain, base)) is not None:
            found[name] = own
    return found


def full_values(weights: AdaptedWeights, base: Base) -> dict[str, Full]:
    """Name in an adapter's file -> what in the base that it was tuned on it takes the place of, of the tensors that do.

    Raises InputError where the config does not say which rows they are, or they are no values of such a tensor.
    """
    found = {}
    for name, own in taken_places(weights, base).items():
        rows = _trained_rows(weights, name, own, base) if name.endswith(f".{_TRAINED_ROWS}") else None
        found[name] = Full(own, rows)
        shape, wanted = weights.file(ADAPTER).shape(name), BaseValues(base, found).shape(name)
        if shape != wanted:
            raise InputError(weights.folder / ADAPTER, f"{name} is {shape}, in {base.folder} it is {wanted}")
    return found


def _stored_as(name: str, base: Base) -> str | None:
    """The name under which the base has a tensor, which may be tied to another; None where it has none."""
    structure = base.structure
    if name in base:
        return name
    if structure.aliases.get(name, "") in base:
        return structure.aliases[name]
    if name in structure.head - structure.untied_head and name.endswith(".weight"):
        return next(iter(sorted(structure.vocabulary.intersection(base.names))), None)
    return None


def _trained_rows(weights: AdaptedWeights, name: str, base_name: str, base: Base) -> tuple[int, ...]:
    """The rows of the base's tensor that one of the file's tensors holds."""
    file, (count, *_) = weights.folder / ADAPTER_CONFIG, weights.file(ADAPTER).shape(name)
    limit = base.shape(base_name)[0]
    module = _module(name)
    found = [rows for key, rows in _index_lists(read_json(file)) if module.endswith(key)]
    rows = found[-1] if found else None
    if not isinstance(rows, list) or len(rows) != count or not all(type(row) is int for row in rows):
        raise InputError(file, f"names the rows {rows!r} of {module}, expected a list of the {count} that {name} has")
    if beyond := [row for row in rows if not 0 <= row < limit]:
        raise InputError(file, f"names row {beyond[0]} of {base_name}, which has {limit} in {base.folder}")
    return tuple(rows)


def _module(name: str) -> str:
    """The module that trained rows belong to."""
    return name.removesuffix(f".{_TRAINED_ROWS}").removesuffix(".token_adapter")


def _index_lists(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(how the name of a module ends, its rows) as an adapter's config has them; PEFT lets the last one win."""
    for field in (_OF_ALL, _BY_MODULE):
        if isinstance(rows := config.get(field), dict):
            yield from rows.items()
        elif rows is not None:
            yield "", rows


def moved_indices(weights: AdaptedWeights, full: Mapping[str, Full], moved: Mapping[str, Full]) -> dict[str, Any]:
    """The fields of an adapter's config that name rows, with the rows that the new base has these tokens in.

    Args:
        full, moved: what each tensor takes the place of in the old base, and in the new one.
    """
    file = weights.folder / ADAPTER_CONFIG

    def rewritten(rows: Any, key: str = "") -> Any:
        if isinstance(rows, dict):
            return {key: rewritten(value, key) for key, value in rows.items()}
        same = [name for name, each in full.items() if each.rows == tuple(rows)]
        meant = [name for name in same if _module(name).endswith(key)] or same
        found = {moved[name].rows or () for name in meant}
        if len(found) > 1:
            raise InputError(file, f"names the rows {rows} of {' and '.join(meant)}, which have other ones now")
        return list(*found) if found else rows

    config = read_json(file)
    return {field: rewritten(config[field]) for field in (_OF_ALL, _BY_MODULE) if config.get(field) is not None}


def moved_full(
    weights: AdaptedWeights, full: Mapping[str, Full], base: Base, rows: Rows, token: Callable[[int], str | None]
) -> dict[str, Full]:
    """What full values take the place of in a base whose vocabulary has its tokens in other rows.

    Args:
        base: the old base.
        token: the old vocabulary's token of a row, for what is said of one that the new vocabulary lacks.
    """
    places = np.flatnonzero(rows.old_row >= 0)
    new_row = dict(zip(rows.old_row[places].tolist(), places.tolist(), strict=True))
    moved = dict(full)
    for name, each in full.items():
        if each.rows is None or each.base_name not in base.structure.vocabulary:
            continue
        for row in each.rows:
            if row not in new_row:
                raise InputError(weights.folder, f"trained token {token(row)!r}, which the new vocabulary lacks")
        moved[name] = replace(each, rows=tuple(new_row[row] for row in each.rows))
    return moved


def on_vocabulary(weights: AdaptedWeights, base: Base) -> dict[str, str]:
    """Name in an adapter's file -> the base's embedding or LM head (a row per token) that the tensor belongs to."""
    tensors = base.structure.vocabulary | base.structure.head
    found = {}
    for name in weights.file(ADAPTER).names:
        module = adapter_base_name(name, base)
        while (module := module.rpartition(".")[0]) and (own := f"{module}.weight") not in tensors:
            pass
        if module and (stored := _stored_as(own, base)) is not None:
            found[name] = stored
    return found


def same_number_of_tokens(weights: AdaptedWeights, base: Base) -> bool:
    """Whether what an adapter's file has per token it has for as many as the base's embeddings have rows."""
    file, by_tensor = weights.file(ADAPTER), on_vocabulary(weights, base)
    sizes: dict[str, set[int]] = {own: set() for own in by_tensor.values()}
    for name, own in by_tensor.items():
        if not name.endswith(f".{_TRAINED_ROWS}"):
            sizes[own].update(file.shape(name))
    return all(not found or base.shape(own)[0] in found for own, found in sizes.items())


def token_dimensions(weights: AdaptedWeights, full: Mapping[str, Full], base: Base) -> dict[str, int]:
    """Name in an adapter's file -> which dimension (0 rows, 1 columns) has an entry per token; others have none.

    Args:
        full: as of `full_values`.
        base: the base that the weights were tuned on.

    Raises InputError where an embedding is changed in a way that no entry per token shows.
    """
    found: dict[str, int] = {}
    unexplained: dict[str, str] = {}
    file, belongs = weights.file(ADAPTER), on_vocabulary(weights, base)
    for name, own in belongs.items():
        count, *width = base.shape(own)
        places = [dim for dim, size in enumerate(file.shape(name)) if size == count]
        if name in full:
            found.update({name: 0} if full[name].rows is None else {})
        elif len(places) > 1 or (places and count in width):
            raise InputError(weights.folder, f"{name} is {file.shape(name)}: which of it is the {count} tokens?")
        elif places:
            found[name] = places[0]
        else:
            unexplained[name] = own
    for name, own in unexplained.items():
        if not any(belongs[each] == own and each not in full for each in found):
            raise InputError(weights.folder, f"{name} changes {own} in a way that cannot follow tokens to other rows")
    return found
