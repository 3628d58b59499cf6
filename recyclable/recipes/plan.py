"""`recyclable plan`: what a run takes on so many devices, memory and time, regime by regime, and the ds_config to use.

Nothing is downloaded but a config, nothing of the model is held: its structure computes without values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from recyclable import machine
from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.objectives.objective import Objective
from recyclable.planning import devices
from recyclable.planning.depth import LAYERS, layers_alike
from recyclable.planning.devices import Device
from recyclable.planning.fitting import MARGIN, MICRO, Fit, Fitter
from recyclable.planning.memory import PARTS
from recyclable.planning.regimes import Regime, Shape, ds_config, regimes
from recyclable.planning.states import Sizes
from recyclable.planning.time import Fleet, seconds
from recyclable.planning.trace import Untraceable
from recyclable.recipes.plan_settings import PlanSettings, run_settings
from recyclable.recipes.planned import Planned, planned
from recyclable.recipes.shallow import with_layers


def plan(settings: PlanSettings, run: dict[str, Any], where: object = "plan", whole: bool = False) -> dict[str, Any]:
    """What `--json` prints (docs/planning.md): `model`, `run`, `devices`, `assumed`, `regimes`, `chosen`, `ds_config`.

    Args:
        run: keys of a run config; `whole`: they are all of one.
        where: it is, for messages.
    """
    made, assumed = run_settings(settings, run, where, whole)
    fleet = fleet_of(settings, assumed)
    if made.train_batch_size % fleet.ranks:
        problem = f"is {made.train_batch_size}, expected a multiple of {fleet.ranks} devices"
        raise InputError("train_batch_size", problem)
    first = planned(made)
    assumed += first.assumed
    evaluated = made.eval_batch_size if "eval_batch_size" in made.model_fields_set or whole else None
    if evaluated is None:
        of_itself = type(made).model_fields["eval_batch_size"].default
        assumed.append(f"evaluation takes no more texts at once than training (eval_batch_size, of itself {of_itself})")
    tries = fitter(made, first, fleet, evaluated)
    sizes, config = Sizes.of(first.objective), first.base.config.get_text_config()
    on_gpu, largest = not fleet.device.on_cpu, -(-max(sizes.all().values()) // fleet.ranks)
    shape = Shape(config.hidden_size, sum(sizes.all().values()), on_gpu, on_gpu, largest)
    tried: dict[str, dict[str, Any]] = {}
    rows = []
    for name, layout in layouts(settings, made, shape, fleet):
        try:
            fit = tries.largest(layout)
        except Untraceable as error:
            problem = f"{config.model_type} cannot be followed without values, so nothing is planned ({error})"
            raise InputError("--model", problem) from error
        found = row_of(name, fit, layout, sizes, fleet, len(first.objective.passes(0)))
        found["tokens_per_s"] = made.train_batch_size * first.settings.max_length / found["seconds_per_step"]
        rows.append(found)
        tried[name] = {**layout, MICRO: fit.rows}
    fitting = [row for row in rows if row["fits"]]
    chosen = min(fitting, key=lambda row: row["seconds_per_step"])["name"] if fitting else None
    if chosen is None and evaluated is not None:
        assumed.append(f"evaluation of {evaluated} texts at once (eval_batch_size)")
    return {
        "model": {
            "name": str(settings.model or made.base),
            "type": config.model_type,
            "parameters": shape.parameters,
            "trained": sum(sizes.trained.values()),
            "teacher": sum(sizes.teacher.values()) + first.asked,
        },
        "run": {
            "objective": type(first.objective).__name__,
            "train_batch_size": made.train_batch_size,
            "max_length": first.settings.max_length,
        },
        "devices": {
            **asdict(fleet.device),
            "count": fleet.ranks,
            "hosts": fleet.hosts,
            "host_memory": fleet.host_memory,
        },
        "margin": MARGIN,
        "assumed": assumed,
        "regimes": rows,
        "chosen": chosen,
        "ds_config": None if chosen is None else tried[chosen],
    }


def fitter(made: Settings, first: Planned, fleet: Fleet, evaluated: int | None = None) -> Fitter:
    """What tries micro-batches of a run; of a deep model with layers alike, few of them.

    Args:
        first: `planned` of the settings.
        evaluated: rows of a batch in evaluation.
    """

    @cache
    def shallow(layers: int) -> Objective:
        with with_layers(made, layers) as few:
            assert few is not None, "layers are alike"
            return planned(few).objective

    def shapes(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in named}

    layers = None
    with with_layers(made, LAYERS) as few:
        # cached answers may be those of every layer
        if few is not None and shapes(planned(few).batch(1).items()) == shapes(first.batch(1).items()):
            layers = layers_alike(shapes(first.objective.named_parameters()))
    share = first.settings.train_batch_size // fleet.ranks
    saves = first.settings.writes_checkpoints
    return Fitter(first.objective, first.batch, share, fleet, evaluated, saves, first.asked, shallow, layers or 0)


def fleet_of(settings: PlanSettings, assumed: list[str]) -> Fleet:
    """The devices that are named, or this machine's."""
    if settings.devices % settings.hosts:
        raise InputError("--hosts", f"is {settings.hosts}, expected a divisor of {settings.devices} devices")
    local = settings.devices // settings.hosts
    device = _device(settings, local)
    if settings.device_memory is not None:
        memory = devices.size(settings.device_memory, "--device-memory")
        device = replace(device, memory=memory)
    if settings.host_memory is not None:
        host = devices.size(settings.host_memory, "--host-memory")
    elif settings.device is None or device.on_cpu:
        host = devices.free_memory()
    else:
        host = device.memory * local
        assumed.append(f"hosts have {host / 1e9:,.0f} GB of memory for this (--host-memory)")
    return Fleet(device, settings.devices, settings.hosts, host, settings.mfu)


def _device(settings: PlanSettings, local: int) -> Device:
    if settings.device == "cpu" or (settings.device is None and not torch.cuda.is_available()):
        return devices.this_cpu(local)
    return devices.this_gpu() if settings.device is None else devices.by_name(settings.device)


def layouts(settings: PlanSettings, made: Any, shape: Shape, fleet: Fleet) -> list[tuple[str, dict[str, Any]]]:
    """(name, ds_config) of all regimes, or of the one that is asked about; InputError where the run would refuse it."""
    found = _layouts(settings, made, shape, fleet)
    for _, layout in found:  # regimes are all in one precision
        machine.require_logits(made.logits, layout)
    return found


def _layouts(settings: PlanSettings, made: Any, shape: Shape, fleet: Fleet) -> list[tuple[str, dict[str, Any]]]:
    again, on_cpu = made.gradient_checkpointing, fleet.device.on_cpu
    if settings.deepspeed_config is None:
        allowed = [each for each in regimes() if again in (None, each.recomputes) and not (on_cpu and _pointless(each))]
        return [(each.name, ds_config(each, shape, nvme=settings.nvme_path)) for each in allowed]
    given = machine.recomputing(machine.load_ds_config(settings.deepspeed_config), again)
    machine.merge(
        given,
        where=settings.deepspeed_config,
        train_batch_size=made.train_batch_size,
        max_grad_norm=made.max_grad_norm,
        world_size=fleet.ranks,
        gradient_checkpointing=again,
        on_cpu=on_cpu,
    )
    return [(Path(settings.deepspeed_config).stem, given)]


def _pointless(regime: Regime) -> bool:
    """Whether nothing is gained on a CPU, whose memory is the host's."""
    return "cpu" in (regime.optimizer, regime.parameters)


def row_of(name: str, fit: Fit, layout: dict[str, Any], sizes: Sizes, fleet: Fleet, passes: int) -> dict[str, Any]:
    """A line of the table."""
    taken = fit.memory
    times = seconds(fit.trace.flops * fit.accumulation, fit.accumulation * passes, sizes, layout, fleet)
    homes = [home if home != "none" else "device" for home in machine.homes(layout)]
    return {
        "name": name,
        "zero_stage": machine.zero_stage(layout),
        "checkpointing": machine.recomputes(layout),
        "optimizer_on": homes[0],
        "parameters_on": homes[1],
        "micro_batch": fit.rows,
        "accumulation": fit.accumulation,
        "memory": {part: getattr(taken, part) for part in PARTS},
        "phase": taken.phase,
        "device_bytes": taken.device,
        "host_bytes": taken.host * fleet.local,
        "nvme_bytes": taken.nvme * fleet.local,
        "fits": fit.fits,
        "seconds": asdict(times),
        "seconds_per_step": times.total,
    }
