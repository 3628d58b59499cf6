"""Starts and ends a DeepSpeed engine around one objective."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed

from recyclable import machine
from recyclable.config import TrainSettings
from recyclable.objectives.objective import Objective
from recyclable.training import distributed
from recyclable.training.optimizer import build_optimizer


@contextmanager
def engine_for(
    objective: Objective, settings: TrainSettings, ds_config: dict[str, Any], out: Path
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """An engine that trains `objective`; TensorBoard files go to out/tensorboard unless ds_config says otherwise."""
    config = machine.merge(
        ds_config,
        where="ds_config",
        train_batch_size=settings.train_batch_size,
        max_grad_norm=settings.max_grad_norm,
        world_size=distributed.world_size(),
    )
    config.setdefault("tensorboard", {"enabled": True, "output_path": str(out), "job_name": "tensorboard"})
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=build_optimizer(objective, settings, config), config=config
    )
    try:
        yield engine
    finally:
        engine.destroy()
        gc.collect()  # ZeRO's hooks and partitions refer to each other
