"""Starts and ends a DeepSpeed engine around one objective."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from recyclable import distributed, machine
from recyclable.config.settings import TrainSettings
from recyclable.objectives.objective import Objective
from recyclable.training import zero
from recyclable.training.optimizer import build_optimizer


def materialize(objective: nn.Module, settings: TrainSettings, ds_config: dict[str, Any]) -> None:
    """Read what is unread of an objective to where its engine will want it (`training.zero.materialize`)."""
    zero.materialize(objective, _merged(settings, ds_config))


def set_attention(model: nn.Module, settings: TrainSettings) -> None:
    """Have a model compute attention as the settings say, if they do."""
    for module in model.modules() if settings.attn_implementation else ():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(settings.attn_implementation)


@contextmanager
def engine_for(
    objective: Objective, settings: TrainSettings, ds_config: dict[str, Any], out: Path
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """An engine that trains `objective`; TensorBoard files go to out/tensorboard unless ds_config says otherwise."""
    set_attention(objective.student, settings)
    materialize(objective, settings, ds_config)
    config = _merged(settings, ds_config)
    # To DeepSpeed each pass over a batch is an accumulation step of its own: the last one of a step is its boundary.
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        config[key] *= len(objective.passes(0))
    for module, parameter in objective.borrowed():
        zero.gather_with(module, parameter)
    config.setdefault("tensorboard", {"enabled": True, "output_path": str(out), "job_name": "tensorboard"})
    with _ended(
        deepspeed.initialize(model=objective, optimizer=build_optimizer(objective, settings, config), config=config)[0]
    ) as engine:
        if distributed.world_size() == 1 and machine.zero_stage(config) == 0 and not machine.is_bf16(config):
            engine.enable_backward_allreduce = False  # it would copy every gradient to add up one rank's
        yield engine


def in_fp32(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The same machine, weights and arithmetic in fp32."""
    return {name: value for name, value in ds_config.items() if name not in machine.PRECISION_KEYS}


@contextmanager
def frozen(module: nn.Module, ds_config: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], torch.device | str]]:
    """A module to call without training it, its weights in the precision that an engine would hold them in; its device.

    Under ZeRO-3 it is partitioned over the ranks, else whole on each.
    """
    config = machine.without_training(ds_config, distributed.world_size())
    zero.materialize(module, config)
    if machine.zero_stage(config) == 3:
        with _ended(deepspeed.initialize(model=module, config=config)[0]) as engine:
            engine.eval()
            yield engine, engine.device
    else:
        device, autocast = distributed.device(), machine.autocast(config)
        module.eval().to(device, getattr(torch, machine.precision(config)))
        yield torch.autocast(device, getattr(torch, autocast))(module.forward) if autocast else module, device


@contextmanager
def _ended(engine: deepspeed.DeepSpeedEngine) -> Iterator[deepspeed.DeepSpeedEngine]:
    try:
        yield engine
    finally:
        engine.destroy()
        gc.collect()  # ZeRO's hooks and partitions refer to each other


def _merged(settings: TrainSettings, ds_config: dict[str, Any]) -> dict[str, Any]:
    return machine.merge(
        ds_config,
        where="ds_config",
        train_batch_size=settings.train_batch_size,
        max_grad_norm=settings.max_grad_norm,
        world_size=distributed.world_size(),
    )
