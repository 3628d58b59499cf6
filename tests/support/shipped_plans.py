"""What the planner says that the shipped ds_configs keep on each device, for the models that their README names."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from shapes import write_shape

from recyclable import machine
from recyclable.planning.states import Sizes, Zero, steady
from recyclable.recipes.planned import planned
from recyclable.recipes.pretrain_settings import read_pretrain_settings

RANKS = {
    "125m_zero1": 8,
    "350m_zero1": 8,
    "350m_zero1_checkpointing": 8,
    "1b_zero2": 8,
    "1b_zero2_checkpointing": 8,
    "3b_zero2": 8,
    "3b_zero3": 8,
    "3b_zero3_checkpointing": 8,
    "3b_zero3_offload_checkpointing": 2,
    "7b_zero3": 8,
    "7b_zero3_checkpointing": 8,
    "7b_zero3_offload": 8,
    "7b_zero3_offload_checkpointing": 2,
    "7b_zero3_nvme_checkpointing": 2,
    "13b_zero3_checkpointing": 8,
    "13b_zero3_offload_checkpointing": 8,
    "13b_zero3_nvme_checkpointing": 8,
    "34b_zero3_checkpointing": 16,
    "34b_zero3_offload_checkpointing": 8,
    "34b_zero3_nvme_checkpointing": 8,
    "70b_zero3_checkpointing": 32,
    "70b_zero3_offload_checkpointing": 8,
    "70b_zero3_nvme_checkpointing": 8,
}
"""Of the runs that the README speaks of; hosts have 8 at most."""


def figures(name: str) -> tuple[str, str, str]:
    """GB that stay on a device, on a host and on its NVMe: the README's figures; nothing where there is nothing."""
    ranks = RANKS[name]
    zero = Zero.of(machine.load_ds_config(name), ranks, on_cpu=False, accumulating=True)
    held, local = steady(sizes(name.partition("_")[0]), zero), min(8, ranks)
    device = f"{held.device.total() / 1e9:.1f}"
    return device, *(f"{local * of.total() / 1e9:,.0f}" if of.total() else "" for of in (held.host, held.nvme))


@cache
def sizes(size: str) -> Sizes:
    """Of a model trained whole on text."""
    with tempfile.TemporaryDirectory() as folder:
        base = write_shape(size, Path(folder) / size)
        keys = {"base": str(base), "lm": "masked" if size in ("125m", "350m") else "causal", "attention": "full"}
        more = {"corpus": "none", "out": "none", "max_steps": 1, "learning_rate": 1e-4}
        return Sizes.of(planned(read_pretrain_settings({**keys, **more}, size)).objective)
