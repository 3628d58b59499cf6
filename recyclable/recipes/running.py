"""Runs the recipe of a verb that takes a run config, once config, ds_config and ranks are known to go together."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from recyclable import distributed, machine
from recyclable.config.settings import Settings, TrainSettings
from recyclable.recipes.same_inputs import require_same_inputs
from recyclable.training.nvme import prepare
from recyclable.weights.durable import disk_failures


def run_recipe(
    verb: str, settings: Settings, ds_config: dict[str, Any], resume: bool, *, run: str | Path, where: str | Path
) -> Any:
    """What the verb's recipe returns; a collective.

    Args:
        run: the run config's file, for messages.
        where: the ds_config's file, for messages.

    Raises RunError where a disk fails; InputError, before `out` is touched, where the batch does not come out whole
    over micro-batches and ranks, the machine lacks what offloading to NVMe needs, or hosts have different bases,
    weights, tasks or corpora.
    """
    require_batches(verb, settings, ds_config, distributed.world_size(), run=run, where=where)
    prepare(ds_config, where)
    require_same_inputs(settings)
    with disk_failures(getattr(settings, "out", "a file")):
        return getattr(import_module(f"recyclable.recipes.{verb}"), verb)(settings, ds_config, resume)


def require_batches(
    verb: str, settings: Settings, ds_config: dict[str, Any], ranks: int, *, run: str | Path, where: str | Path
) -> None:
    """InputError where a batch of any of the verb's runs does not come out whole over micro-batches and so many ranks.

    Args:
        run, where: as for `run_recipe`.
    """
    recipe = import_module(f"recyclable.recipes.{verb}")
    for each in getattr(recipe, "runs", lambda only: [only])(settings):
        if isinstance(each, TrainSettings):
            machine.merge(
                ds_config,
                where=where,
                run=run,
                train_batch_size=each.train_batch_size,
                max_grad_norm=each.max_grad_norm,
                world_size=ranks,
                gradient_checkpointing=each.gradient_checkpointing,
            )
