"""Outdated weights on a new base, written without a model: as an adapter, or as a delta; a few pieces at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from recyclable.carrying.carried import Carried
from recyclable.carrying.starts import start_adapter
from recyclable.weights.checkpoint_files import Ranged, Stored
from recyclable.weights.delta import write_differences
from recyclable.weights.differences import Differences
from recyclable.weights.durable import write_json
from recyclable.weights.files import write_as_is
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, DELTA, HEAD
from recyclable.weights.strict_json import read_json
from recyclable.weights.team import ALONE, Team


class AdapterOnBase(Ranged):
    """An adapter's tensors on the new base, by PEFT's names, in the dtypes of its file.

    Args:
        differences: those of the adapter, or made from them.
    """

    def __init__(self, carried: Carried, differences: Differences) -> None:
        self._file, self._differences = carried.weights.file(ADAPTER), differences
        self._new, self._own = carried.new_values, carried.unmoved

    @property
    def names(self) -> list[str]:
        """As they lie in the file."""
        return self._file.names

    def stored(self, name: str) -> Stored:
        """Dtype and shape; it lies nowhere."""
        return Stored(self._file.stored(name).dtype, self._differences.shape(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in its stored dtype."""
        stored = self.stored(name)
        stop = stored.numel if stop is None else stop
        return start_adapter(self._new, self._differences, name, start, stop, own=self._own).to(stored.dtype)


def write_adapter(carried: Carried, differences: Differences, into: Path, base_name: str, team: Team = ALONE) -> None:
    """The adapter in PEFT's format, full values of the new base added where it holds full values; a collective.

    Args:
        differences: those of the adapter, or made from them.
        base_name: what PEFT's config calls the base: a hint, the manifest decides.
    """
    write_as_is(into / ADAPTER, AdapterOnBase(carried, differences), team)
    if team.rank == 0:
        config = read_json(carried.weights.folder / ADAPTER_CONFIG)
        write_json(into / ADAPTER_CONFIG, {**config, **carried.moved_indices(), "base_model_name_or_path": base_name})


def write_delta_and_head(carried: Carried, differences: Differences, into: Path, team: Team = ALONE) -> None:
    """The differences as a delta of the new base, and the old head as it is; a collective."""
    weights = carried.weights
    if differences is weights.delta and carried.own:
        if team.rank == 0:
            shutil.copyfile(weights.folder / DELTA, into / DELTA)
    else:  # without corrections: those are of the old base
        write_differences(into / DELTA, differences, team, weights.delta.untouched)
    write_as_is(into / HEAD, weights.file(HEAD), team)
