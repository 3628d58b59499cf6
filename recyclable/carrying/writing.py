"""Outdated weights on a new base, written without a model: as an adapter, or as a delta; a few pieces at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from recyclable.carrying.carried import Carried
from recyclable.carrying.starts import AdapterDifferences, start_adapter
from recyclable.weights.delta import write_differences
from recyclable.weights.differences import Differences, Scaled
from recyclable.weights.durable import write_json
from recyclable.weights.files import write_as_is, write_in_pieces
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, DELTA, HEAD
from recyclable.weights.strict_json import read_json
from recyclable.weights.team import ALONE, Team


def write_adapter(
    carried: Carried,
    differences: Differences,
    scales: Mapping[str, float],
    into: Path,
    base_name: str,
    team: Team = ALONE,
) -> None:
    """The adapter in PEFT's format, full values of the new base added where it holds full values; a collective.

    Args:
        differences: those of the adapter.
        scales: tensor -> strength.
        base_name: what PEFT's config calls the base: a hint, the manifest decides.
    """
    file, shared, new = carried.weights.file(ADAPTER), carried.shared, carried.new.hashed
    if scales:
        differences = Scaled(differences, scales)
    elif carried.own:  # full values come back bit for bit only where nothing is subtracted from them
        differences, shared = AdapterDifferences(file, new, {}), {}
    layout = {name: (file.stored(name).dtype, file.shape(name)) for name in file.names}

    def piece(name: str, begin: int, end: int) -> torch.Tensor:
        return start_adapter(new, differences, name, shared.get(name), begin, end).to(layout[name][0])

    write_in_pieces(into / ADAPTER, layout, piece, team=team)
    if team.rank == 0:
        config = read_json(carried.weights.folder / ADAPTER_CONFIG)
        write_json(into / ADAPTER_CONFIG, {**config, "base_model_name_or_path": base_name})


def write_delta_and_head(carried: Carried, differences: Differences, into: Path, team: Team = ALONE) -> None:
    """The differences as a delta of the new base, and the old head as it is; a collective."""
    weights = carried.weights
    if differences is weights.delta and carried.own:
        if team.rank == 0:
            shutil.copyfile(weights.folder / DELTA, into / DELTA)
    else:  # without corrections: those are of the old base
        write_differences(into / DELTA, differences, team)
    write_as_is(into / HEAD, weights.file(HEAD), team)
