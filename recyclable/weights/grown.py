"""A base with more rows in its embeddings than its files have: new tokens' rows are the mean of old tokens' ones.

So a new token begins as what the model knows of its parts, inside the convex hull of the old rows: a row that begins as
noise may take all probability from the old ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
Models"). The mean over the old tokenizer's pieces of the new one is that of Gee et al. 2022, "Fast Vocabulary Transfer
for Language Model Compression" (EMNLP industry track, arXiv 2402.09977). Rows are read by range, like everything else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PretrainedConfig

from recyclable.architectures.names import canonical_name
from recyclable.architectures.structure import Structure
from recyclable.errors import InputError
from recyclable.weights.algebra import flat_range
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged, Source, Stored

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

_SIZE = "vocab_size"


class GrownRows(Source):
    """Tensors of which some have more rows than their source.

    Args:
        places: names of those, which of their dimensions has an entry per token; those before it are 1.
        first: the first new row.
        parts: of each new row, the old rows that it is the mean of.
        rows: how many there are in all; those behind the new ones are the source's.
    """

    def __init__(
        self, source: Ranged, places: Mapping[str, int], first: int, parts: Sequence[Sequence[int]], rows: int
    ) -> None:
        self.source, self._places, self._first, self._parts, self._rows = source, places, first, parts, rows

    @property
    def names(self) -> list[str]:
        """The source's."""
        return self.source.names

    def stored(self, name: str) -> Stored:
        """Dtype and shape; it lies nowhere."""
        stored = self.source.stored(name)
        if name not in self._places:
            return stored
        place = self._places[name]
        return Stored(stored.dtype, (*stored.shape[:place], self._rows, *stored.shape[place + 1 :]))

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8."""
        size = self.stored(name).dtype.itemsize
        first = start // size
        whole: np.ndarray = self.read(name, first, -(-stop // size)).view(torch.uint8).numpy()
        return whole[start - first * size : stop - first * size]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor; means are summed in fp32 and rounded once."""
        if name not in self._places:
            return self.source.read(name, start, stop)
        stored = self.stored(name)
        width = math.prod(stored.shape[self._places[name] + 1 :])
        stop = stored.numel if stop is None else stop
        if start >= stop:
            return torch.empty(0, dtype=stored.dtype)
        begin, end = self._first * width, (self._first + len(self._parts)) * width

        def means(first: int, last: int) -> torch.Tensor:
            made = [self._mean(name, parts, width) for parts in self._parts[first:last]]
            return torch.stack(made).to(stored.dtype) if made else torch.empty(0, width, dtype=stored.dtype)

        pieces = []
        if start < begin:
            pieces.append(self.source.read(name, start, min(stop, begin)))
        if start < end and begin < stop:
            pieces.append(flat_range(means, width, max(start, begin) - begin, min(stop, end) - begin))
        if end < stop:
            pieces.append(self.source.read(name, max(start, end), stop))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _mean(self, name: str, parts: Sequence[int], width: int) -> torch.Tensor:
        return torch.stack([self.source.read(name, row * width, (row + 1) * width).float() for row in parts]).mean(0)


class GrownBase(Base):
    """A base with rows for new tokens, in everything that has an entry per token: embeddings, heads, their biases.

    What is read of the old rows is read, and hashed, through the base that it is made from.

    Args:
        base: has rows for the old tokens.
        first: the first new token's row. Rows that the base has there already belong to no token, and are used up.
        parts: of each new token, the old ones that it starts as the mean of.

    Raises InputError where something has entries per token in a way that is not known.
    """

    def __init__(self, base: Base, first: int, parts: Sequence[Sequence[int]]) -> None:
        self.folder, self.prefix = base.folder, base.prefix
        self.config = grown_config(base.config, first + len(parts))
        self.structure = Structure(self.config)
        self.structure.parted = base.structure.parted
        rows, places = self.config.vocab_size, token_dimensions(base)
        in_files = {name: place for name in base.source.names if (place := _place(places, name, base)) is not None}
        self.stored_name = base.stored_name
        self.source = GrownRows(base.source, in_files, first, parts, rows)
        own = {name: in_files[stored] for name, stored in base.stored_name.items() if stored in in_files}
        self.hashed = GrownRows(base.hashed, own, first, parts, rows)  # type: ignore[assignment]


def grown_config(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """The config with room for so many rows; as it is where it has more. Raises InputError for one that has none."""
    if not isinstance(getattr(config, _SIZE, None), int):
        raise InputError("config.json", f"{config.model_type!r} has no {_SIZE}, expected embeddings of tokens")
    grown = copy.deepcopy(config)
    grown.vocab_size = max(rows, config.vocab_size)
    return grown


def token_dimensions(base: Base) -> dict[str, int]:
    """Canonical name -> the dimension that has an entry per token, of all parameters and buffers that have one.

    Found by building the language model, and the backbone, with another number of tokens.
    """
    found: dict[str, int] = {}
    pairs = []
    own = grown_config(base.config, 0)
    for config in (own, grown_config(own, own.vocab_size + 1)):
        structure = Structure(config)
        pairs.append(_shapes(structure.backbone, base) | _shapes(structure.language_model, base))
    for name, shape in pairs[0].items():
        other = [place for place, sizes in enumerate(zip(shape, pairs[1][name], strict=True)) if len(set(sizes)) > 1]
        if other and (len(other) > 1 or math.prod(shape[: other[0]]) > 1):
            raise InputError(base.folder, f"{name} is {shape}, which cannot have more tokens: expected one a row")
        found.update({name: other[0]} if other else {})
    return found


def _shapes(model: PreTrainedModel | None, base: Base) -> dict[str, tuple[int, ...]]:
    saved = {} if model is None else model.state_dict()
    return {canonical_name(name, base.prefix): tuple(tensor.shape) for name, tensor in saved.items()}


def _place(places: Mapping[str, int], stored: str, base: Base) -> int | None:
    """Which dimension of a tensor in the files has an entry per token; None for none."""
    return places.get(canonical_name(stored, base.prefix))
