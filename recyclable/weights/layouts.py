"""The two layouts of a checkpoint: as today's model names and shapes its tensors, and as files have them.

Transformers converts the files of many families as it loads them: experts that lie apart become one tensor, fused
projections are parted, modules have other names. Its own conversions are applied to tensors without values
(`weights.rearranged`), so what comes out is read by range, and no tensor is made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from recyclable.architectures.structure import Structure, conversions
from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import Ranged, Source, Stored, TensorFiles
from recyclable.weights.rearranged import Held, Planned


class Rearranged(Source):
    """Tensors that are made of stored ones, by their names here.

    Args:
        planned: of tensors of any source.
    """

    def __init__(self, planned: Mapping[str, Planned]) -> None:
        self._planned = planned

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._planned)

    def __contains__(self, name: str) -> bool:
        return name in self._planned

    def stored(self, name: str) -> Stored:
        """Dtype and shape; where it is stored as it is, its place as well."""
        planned = self._planned[name]
        if isinstance(planned.plan, Held):
            return planned.plan.tensors.stored(planned.plan.name)
        return Stored(planned.dtype, tuple(planned.shape))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in its stored dtype, as a new flat CPU tensor."""
        planned = self._planned[name]
        stop = planned.numel() if stop is None else stop
        return planned.plan.read(start, stop) if start < stop else torch.empty(0, dtype=planned.dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8; they are those of whole elements."""
        size = self._planned[name].dtype.itemsize
        return self.read(name, start // size, stop // size).view(torch.uint8).numpy()

    def origin(self, name: str) -> tuple[object, str]:
        """The file, where it is stored as it is."""
        plan = self._planned[name].plan
        if isinstance(plan, Held) and isinstance(plan.tensors, Source):
            return plan.tensors.origin(plan.name)
        return super().origin(name)


class ModelFiles(Rearranged):
    """The tensors of an HF model directory as today's model has them, whichever layout its files have.

    Raises InputError where transformers would make a tensor otherwise than by rearranging stored ones.
    """

    def __init__(self, files: TensorFiles, structure: Structure) -> None:
        self.folder = files.folder
        super().__init__(_converted(files, structure))

    def origin(self, name: str) -> tuple[object, str]:
        """The file, or the directory of a tensor that is made of several."""
        where, named = super().origin(name)
        return (where if isinstance(where, Path) else self.folder), named


def model_files(folder: Path, structure: Structure) -> TensorFiles | ModelFiles:
    """As `ModelFiles`; the files themselves for a family whose files transformers takes as they are."""
    files = TensorFiles(folder)
    return ModelFiles(files, structure) if conversions(structure.whole) else files


def as_saved(model: PreTrainedModel, tensors: Ranged) -> Ranged:
    """A model's tensors as `save_pretrained` would lay them out in files, which is how other programs expect them.

    Args:
        model: its structure is enough.
        tensors: by the model's names; none is read yet.

    Raises InputError where transformers would make more of them than a rearrangement.
    """
    if not conversions(model):
        return tensors
    planned = {name: Planned.stored(tensors, name) for name in tensors.names}
    try:
        with torch.no_grad():
            return Rearranged(revert_weight_conversion(model, planned))
    except Exception as error:  # whatever an operation makes of tensors without values
        reason = str(error).partition("\n")[0]
        problem = f"{type(model).__name__} cannot be laid out in files as transformers has them ({reason})"
        raise InputError(model.config.model_type, problem) from error


def former_modules(names: Iterable[str], structure: Structure) -> dict[str, str]:
    """Modules of an adapter's tensors that today's model no longer has -> the tensor that they became part of.

    Args:
        names: without what PEFT puts before them: `model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight`.
    """
    transforms, found = _Transforms(structure), {}
    for name in names if transforms.converters else ():
        parts = name.split(".")
        for module in (".".join(parts[:end]) for end in range(1, len(parts))):
            today, pattern = transforms.today(f"{module}.weight")
            if pattern is not None and today in structure.whole_names:
                found[module] = today
    return found


class _Transforms:
    """What transformers does to the names of a family's files as it loads them; it keeps state, so one for each use."""

    def __init__(self, structure: Structure) -> None:
        every = conversions(structure.whole)
        self.renamings = [each for each in every if isinstance(each, WeightRenaming)]
        self.converters = [each for each in every if isinstance(each, WeightConverter)]
        self.owner = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        self._prefix, self._wanted = structure.prefix, structure.whole_names

    def today(self, stored: str) -> tuple[str, str | None]:
        """Today's name of a stored tensor, or of the first that it is a part of; in that case the pattern that it has.

        A name that is today's own already is left alone.
        """
        name, pattern = rename_source_key(stored, self.renamings, self.converters, self._prefix, self._wanted)
        if name not in self._wanted:
            plain, _ = rename_source_key(stored, [], [], self._prefix, self._wanted)
            if plain in self._wanted:
                return plain, None
        return name, pattern


def _converted(files: TensorFiles, structure: Structure) -> dict[str, Planned]:
    """Today's name -> the tensor, as `convert_and_load_state_dict_in_model` of transformers would make it."""
    transforms, wanted = _Transforms(structure), structure.whole_names
    made: dict[str, Planned] = {}
    parts: dict[str, WeightConverter] = {}
    for stored in sorted(files.names, key=dot_natural_key):
        name, pattern = transforms.today(stored)
        tensor = Planned.stored(files, stored)
        if pattern is not None and name in wanted:
            converter = parts.setdefault(name, copy.deepcopy(transforms.owner[pattern]))
            converter.add_tensor(name, stored, pattern, tensor)
            continue
        name = stored if pattern is not None else name  # of a part that the model does not have
        if name in made:
            raise InputError(files.folder, f"{stored} and another tensor of its files are both {name}")
        made[name] = tensor
    for first, converter in parts.items():
        sources = sorted(source for names in converter.layer_targets.values() for source in names)
        for name, tensor in _made(first, converter, sources, structure.whole, files.folder).items():
            if name in made:
                raise InputError(files.folder, f"holds {name} twice: as it is, and as {sources[0]}")
            if name in wanted and tensor.shape != wanted[name].shape:
                shapes = f"{tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
                raise InputError(files.folder, f"its {sources[0]} and the like make {name} {shapes}")
            made[name] = tensor
    return made


def _made(
    first: str, converter: WeightConverter, sources: list[str], model: PreTrainedModel, folder: Path
) -> dict[str, Planned]:
    """What a converter makes of the tensors that it has collected, by today's names.

    Args:
        first: the first of these.
        sources: the names of those, for messages.
    """
    try:
        with torch.no_grad():
            results: dict[str, Any] = converter.convert(first, model=model, config=model.config)
    except Exception as error:  # whatever an operation makes of tensors without values
        steps = ", ".join(type(operation).__name__ for operation in converter.operations)
        of = f"{sources[0]}{f' and {len(sources) - 1} more' if sources[1:] else ''} by {steps}"
        reason = str(error).partition("\n")[0]
        raise InputError(folder, f"transformers makes {first} of {of}, which cannot be ({reason})") from error
    return {name: result[0] if isinstance(result, list) else result for name, result in results.items()}
