"""What `plan` says of each shipped ds_config for GPUs, on the devices and for the model that its README names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from shapes import SHAPES, write_shape

from recyclable import machine
from recyclable.architectures.recomputing import recompute_layers
from recyclable.objectives.objective import Objective
from recyclable.planning.devices import by_name
from recyclable.planning.fitting import Fit, Fitter
from recyclable.planning.time import Fleet
from recyclable.recipes.planned import planned
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.shallow import with_layers


class Meant(NamedTuple):
    """What a file is for."""

    ranks: int
    gigabytes: int
    """Of a device."""


MEANT = {
    "125m_zero1": Meant(8, 16),
    "350m_zero1": Meant(8, 24),
    "350m_zero1_checkpointing": Meant(8, 16),
    "1b_zero2": Meant(8, 24),
    "1b_zero2_checkpointing": Meant(8, 24),
    "3b_zero2": Meant(8, 40),
    "3b_zero3": Meant(8, 24),
    "3b_zero3_checkpointing": Meant(8, 24),
    "3b_zero3_offload_checkpointing": Meant(2, 24),
    "7b_zero3": Meant(8, 40),
    "7b_zero3_checkpointing": Meant(8, 40),
    "7b_zero3_offload": Meant(8, 24),
    "7b_zero3_offload_checkpointing": Meant(2, 40),
    "7b_zero3_nvme_checkpointing": Meant(2, 40),
    "13b_zero3_checkpointing": Meant(8, 80),
    "13b_zero3_offload_checkpointing": Meant(8, 40),
    "13b_zero3_nvme_checkpointing": Meant(8, 40),
    "34b_zero3_checkpointing": Meant(16, 80),
    "34b_zero3_offload_checkpointing": Meant(8, 80),
    "34b_zero3_nvme_checkpointing": Meant(8, 80),
    "70b_zero3_checkpointing": Meant(32, 80),
    "70b_zero3_offload_checkpointing": Meant(8, 80),
    "70b_zero3_nvme_checkpointing": Meant(8, 80),
}


def length_of(name: str) -> int:
    """Tokens per text that a file is planned for."""
    return 512 if SHAPES[name.partition("_")[0]]["model_type"] == "roberta" else 2048


def fit(name: str, ds_config: dict[str, Any]) -> Fit:
    """One micro-batch of two that make up a step, as the file has it."""
    meant = MEANT[name]
    fleet = Fleet(replace(by_name("h100"), memory=meant.gigabytes * 1e9), meant.ranks, -(-meant.ranks // 8), 4e12)
    share = 2 * ds_config.get("train_micro_batch_size_per_gpu", 32)
    return _fitter(name.partition("_")[0], share, fleet).largest(ds_config)


def _fitter(size: str, share: int, fleet: Fleet) -> Fitter:
    settings, batch, objective, traces = _run(size)
    layers = SHAPES[size]["num_hidden_layers"]
    return Fitter(objective, batch, share, fleet, None, objective, layers, traces)


@cache
def _run(size: str) -> tuple[Any, Any, Callable[..., Objective], dict[Any, Any]]:
    folder = write_shape(size, Path(tempfile.mkdtemp()) / size)
    masked = SHAPES[size]["model_type"] == "roberta"
    keys = {"base": str(folder), "lm": "masked" if masked else "causal", "max_length": length_of(size)}
    settings = read_pretrain_settings(
        {**keys, "corpus": "c", "out": "o", "max_steps": 1, "learning_rate": 1e-4, "attention": "full"}, size
    )

    @cache
    def objective(recomputes: bool, layers: int | None = None) -> Objective:
        with nullcontext(settings) if layers is None else with_layers(settings, layers) as few:
            found = planned(few).objective
        if recomputes:
            recompute_layers(found.student)
        return found

    return settings, planned(settings).batch, objective, {}


def row(name: str) -> str:
    """The file's line in ds_configs/README.md."""
    ds_config = machine.load_ds_config(name)
    found, meant = fit(name, ds_config), MEANT[name]
    taken = found.memory
    host, nvme = (f"{8 * size / 1e9:,.0f}" if size else "" for size in (taken.host * min(8, meant.ranks) / 8, taken.nvme * min(8, meant.ranks) / 8))
    micro = ds_config["train_micro_batch_size_per_gpu"]
    return f"| `{name}.json` | {meant.gigabytes} GB x {meant.ranks} | {micro} x {length_of(name)} | {taken.device / 1e9:.1f} | {host} | {nvme} |"
