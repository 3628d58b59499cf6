"""Starts and ends a DeepSpeed engine around one objective."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from recyclable import distributed, machine
from recyclable.architectures import attention
from recyclable.architectures.compiling import compiled_layers, require_compiler
from recyclable.architectures.recomputing import recompute_layers
from recyclable.config.settings import TrainSettings
from recyclable.errors import InputError
from recyclable.objectives.objective import Objective
from recyclable.training import nvme, zero
from recyclable.training.events import outlive
from recyclable.training.muon import import_muon
from recyclable.training.optimizer import build_optimizer
from recyclable.training.whole import simplify, with_masters


def materialize(objective: Objective, settings: TrainSettings, ds_config: dict[str, Any]) -> None:
    """Have an objective compute as settings and ds_config say, and read what is unread of it to where its engine will
    want it (`training.zero.materialize`). Twice is once."""
    nvme.prepare(ds_config, "ds_config")
    config = _merged(settings, ds_config)
    if settings.torch_compile:
        _require_compilable(objective, config)
    set_attention(objective.student, settings, ds_config)
    if machine.recomputes(config):
        recompute_layers(objective.student, machine.saves_on_host(config))
    zero.materialize(objective, config)


def _require_compilable(objective: Objective, config: dict[str, Any]) -> None:
    """InputError where the machine has no compiler, or weights come into the layers while these compute."""
    require_compiler()
    if machine.zero_stage(config) == 3:
        problem = "is true, but ZeRO-3 gathers weights within the layers, which cannot be compiled then"
        raise InputError("torch_compile", f"{problem}: expected false, or ZeRO stage 0 to 2")
    if len(objective.passes(0)) > 1:
        problem = "is true, but points of a path mix weights within the layers, which cannot be compiled then"
        raise InputError("torch_compile", f"{problem}: expected false")


def set_attention(model: nn.Module, settings: TrainSettings, ds_config: dict[str, Any]) -> None:
    """Have a model compute attention as the settings say; else the fastest way that model and machine have."""
    machine_here = attention.Machine() if settings.packs_apart else attention.this_machine()
    half = "16" in machine.precision(ds_config) or machine.autocast(ds_config) is not None
    attention.set_attention(model, settings.attn_implementation, half, machine_here)


@contextmanager
def engine_for(
    objective: Objective, settings: TrainSettings, ds_config: dict[str, Any], out: Path
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """An engine that trains `objective`; TensorBoard files go to out/tensorboard unless ds_config says otherwise."""
    materialize(objective, settings, ds_config)
    config = _merged(settings, ds_config)
    # To DeepSpeed each pass over a batch is an accumulation step of its own: the last one of a step is its boundary.
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        config[key] *= len(objective.passes(0))
    for module, parameter in objective.borrowed():
        zero.gather_with(module, parameter)
    if "tensorboard" not in config:
        config["tensorboard"] = {"enabled": True, "output_path": str(out), "job_name": "tensorboard"}
        distributed.main_writes(lambda: (out / "tensorboard").mkdir(parents=True, exist_ok=True))
    import_muon()
    whole, optimizer = machine.zero_stage(config) == 0, build_optimizer(objective, settings)
    compiled = compiled_layers(objective.student) if settings.torch_compile else nullcontext()
    with zero.its_products(config):
        with with_masters() if whole and machine.is_bf16(config) else nullcontext():
            initialized = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
        with _ended(initialized[0], config) as engine, compiled:
            if whole:
                simplify(engine)
            distributed.say(f"attention: {attention.attention_of(objective.student)}")
            outlive(engine.monitor)
            yield engine


def in_fp32(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The same machine, weights and arithmetic in fp32."""
    return {name: value for name, value in ds_config.items() if name not in machine.PRECISION_KEYS}


def to_ask(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The complete DeepSpeed config of an engine that only computes."""
    nvme.prepare(ds_config, "ds_config")
    world_size = distributed.world_size()
    return machine.as_run(machine.without_training(nvme.with_own_folder(ds_config, "asked"), world_size), world_size)


@contextmanager
def frozen(module: nn.Module, ds_config: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], torch.device | str]]:
    """A module to call without training it, its weights in the precision that an engine would hold them in; its device.

    Under ZeRO-3 it is partitioned over the ranks, else whole on each.
    """
    config = to_ask(ds_config)
    zero.materialize(module, config)
    if machine.zero_stage(config) == 3:
        import_muon()
        with zero.its_products(config), _ended(deepspeed.initialize(model=module, config=config)[0], config) as engine:
            engine.eval()
            yield engine, engine.device
    else:
        device, autocast = distributed.device(), machine.autocast(config)
        module.eval().to(device, getattr(torch, machine.precision(config)))
        yield torch.autocast(device, getattr(torch, autocast))(module.forward) if autocast else module, device


@contextmanager
def _ended(engine: deepspeed.DeepSpeedEngine, config: dict[str, Any]) -> Iterator[deepspeed.DeepSpeedEngine]:
    try:
        yield engine
    finally:
        engine.destroy()
        gc.collect()  # ZeRO's hooks and partitions refer to each other
        nvme.clear(config)


def _merged(settings: TrainSettings, ds_config: dict[str, Any]) -> dict[str, Any]:
    world_size = distributed.world_size()
    merged = machine.merge(
        nvme.with_own_folder(ds_config, "trained"),
        where="ds_config",
        train_batch_size=settings.train_batch_size,
        max_grad_norm=settings.max_grad_norm,
        world_size=world_size,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    return machine.as_run(merged, world_size)
