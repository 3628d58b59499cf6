"""`recyclable plan --scale`: a step's time, and what it takes, from a host to a thousand devices and for models of all
sizes, each by the regime that is the fastest there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recyclable import machine
from recyclable.errors import InputError
from recyclable.planning import time
from recyclable.planning.fitting import MARGIN, Fit, Fitter
from recyclable.planning.known import KNOWN
from recyclable.planning.regimes import Shape
from recyclable.planning.states import Sizes, Zero, steady
from recyclable.planning.time import Fleet
from recyclable.planning.trace import Untraceable
from recyclable.recipes.plan import fitter, fleet_of, layouts, row_of
from recyclable.recipes.plan_settings import PlanSettings, run_settings
from recyclable.recipes.planned import Planned, planned
from recyclable.training.flops import ModelFlops, Work, model_flops

LOCAL, MOST = 8, 1024
"""Devices of a host, and in all, where nothing says so."""
_DAY = 86_400
_MOST_TOKENS = 1 << 24
"""Of a step on each device: they are made, to be counted."""


@dataclass(frozen=True)
class _Model:
    """A run of one model, on any number of devices."""

    name: str
    made: Any
    """Its settings."""
    first: Planned
    tries: Fitter
    sizes: Sizes
    flops: ModelFlops
    batch: int | None
    """Rows of a step of all devices together; None: `rows` on each."""
    rows: int
    assumed: list[str]


def plan_scale(settings: PlanSettings, run: dict[str, Any], where: object = "plan", whole: bool = False) -> Any:
    """What `--json` prints (docs/scaling.md): `devices`, `assumed`, and `rows`, a model on so many devices each.

    Args:
        run: keys of a run config; `whole`: they are all of one. Its `train_batch_size` is that of all devices together
            (strong scaling); without one each device has `tokens_per_device` (weak scaling).
        where: it is, for messages.
    """
    assumed: list[str] = []
    fleets = _fleets(settings, assumed)
    rows: list[dict[str, Any]] = []
    for model in _models(settings, run, where, whole, fleets[0]):
        assumed += model.assumed
        found: list[dict[str, Any]] = []
        for fleet in fleets:
            if model.batch is None or model.batch % fleet.ranks == 0:
                least = next((row for row in found if row["fits"]), None)
                found.append(_row(model, fleet, settings, least))
        rows += found
    if not rows:
        raise InputError("train_batch_size", f"is {run['train_batch_size']}, expected a multiple of {fleets[0].ranks}")
    fleet = fleets[-1]
    return {
        "devices": {**asdict(fleet.device), "on_a_host": fleet.local, "host_memory": fleet.host_memory},
        "assumed": [*_rates(fleet), *dict.fromkeys(assumed)],
        "rows": rows,
    }


def _fleets(settings: PlanSettings, assumed: list[str]) -> list[Fleet]:
    """Of a host's devices, or 8 if those are fewer, and twice as many, up to the most."""
    most = settings.devices if "devices" in settings.model_fields_set else MOST
    if "hosts" in settings.model_fields_set:
        devices, hosts = most, settings.hosts
    else:
        local = 1 if settings.device == "cpu" or (settings.device is None and not _has_gpu()) else min(LOCAL, most)
        hosts = -(-most // local)
        devices = local * hosts
    largest = fleet_of(settings.model_copy(update={"devices": devices, "hosts": hosts}), assumed)
    local = largest.local
    ranks, found = min(max(local, LOCAL), most), []
    while ranks <= most:
        found.append(replace(largest, ranks=ranks, hosts=-(-ranks // local)))
        ranks *= 2
    return found


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _models(settings: PlanSettings, run: dict[str, Any], where: object, whole: bool, fleet: Fleet) -> Iterator[_Model]:
    """The one that is named, or those of known sizes; each only while it is looked at."""
    named = settings.model or run.get("base")
    if named is not None and named not in KNOWN:
        yield _model(Path(named).name, settings, run, where, whole, fleet)
        return
    for size in KNOWN if named is None else [named]:
        known = KNOWN[size]
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(known.config), encoding="utf-8")
            content = {**({} if whole else {"max_length": known.length}), **run, "base": folder}
            at_place = settings.model_copy(update={"model": folder})
            yield _model(f"{size} {known.name}", at_place, content, where, whole, fleet)


def _model(name: str, settings: PlanSettings, run: dict[str, Any], where: object, whole: bool, fleet: Fleet) -> _Model:
    named = "train_batch_size" in run and "tokens_per_device" not in settings.model_fields_set
    made, assumed = run_settings(settings, run if named else {**run, "train_batch_size": 1}, where, whole)
    batch = made.train_batch_size if named else None
    first = planned(made)
    length = first.settings.max_length
    rows = max(1, settings.tokens_per_device // length)
    told = f"{rows} x {length} tokens on each device" if batch is None else f"{batch} x {length} tokens"
    lines = [f"{name}: steps of {told}", *assumed, *first.assumed]
    sizes, flops = Sizes.of(first.objective), model_flops(first.objective)
    return _Model(name, made, first, fitter(made, first, fleet), sizes, flops, batch, rows, lines)


def _row(model: _Model, fleet: Fleet, settings: PlanSettings, least: dict[str, Any] | None) -> dict[str, Any]:
    """What the fastest regime takes; `least`: the row of the fewest devices that do."""
    share = model.rows if model.batch is None else model.batch // fleet.ranks
    tokens = share * model.first.settings.max_length * fleet.ranks
    if tokens > _MOST_TOKENS * fleet.ranks:
        problem = f"are {tokens / fleet.ranks:.3g} of {model.name} on each of {fleet.ranks} devices"
        raise InputError("tokens of a step", f"{problem}, expected {_MOST_TOKENS:,} at most")
    row: dict[str, Any] = {"model": model.name, "parameters": sum(model.sizes.all().values())}
    row |= {"devices": fleet.ranks, "hosts": fleet.hosts, "tokens_per_step": tokens, "fits": False}
    found = _fastest(model, replace(model.tries, fleet=fleet, share=share), settings)
    if found is None:
        return row
    told = max(model.first.objective.counts(model.first.batch(share)).values()) * fleet.ranks
    took = found["seconds_per_step"]
    each = tokens / took / fleet.ranks
    of_least = each if least is None else least["tokens_per_s"] / least["devices"]
    return {
        **row,
        **found,
        "tokens_per_s": tokens / took,
        "mfu": model.flops.of(Work(share * fleet.ranks, tokens, told)) / (took * fleet.device.flops * fleet.ranks),
        "efficiency": each / of_least,
        "device_days_per_billion_tokens": 1e9 / each / _DAY,
    }


def _fastest(model: _Model, tries: Fitter, settings: PlanSettings) -> dict[str, Any] | None:
    """A plan's row of the fastest regime that fits: one that keeps things elsewhere only where no other does.

    Higher stages say more, so that none is looked at above the lowest from 1 on that fits; and nothing is gained by
    computing layers again where stage 0 or 1 goes without.
    """
    sizes, fleet, passes = model.sizes, tries.fleet, len(model.first.objective.passes(0))
    config, on_gpu = model.first.base.config.get_text_config(), not fleet.device.on_cpu
    parameters = sizes.all().values()
    shape = Shape(config.hidden_size, sum(parameters), on_gpu, on_gpu, -(-max(parameters) // fleet.ranks))
    made = model.made.model_copy(update={"train_batch_size": tries.share * fleet.ranks})
    every = layouts(settings, made, shape, fleet)
    for elsewhere in (False, True):
        found: list[dict[str, Any]] = []
        for again in (False, True):
            for name, layout in every:
                kind = machine.homes(layout) != ("none", "none"), machine.recomputes(layout)
                if kind != (elsewhere, again) or _too_much(sizes, layout, fleet):
                    continue
                fit = _tried(tries, layout, config.model_type)
                if fit.fits:
                    found.append(row_of(name, fit, layout, sizes, fleet, passes))
                    if found[-1]["zero_stage"]:
                        break
            if any(row["zero_stage"] <= 1 for row in found):
                break
        if found:
            return min(found, key=lambda row: row["seconds_per_step"])
    return None


def _tried(tries: Fitter, layout: dict[str, Any], kind: str) -> Fit:
    try:
        return tries.largest(layout)
    except Untraceable as error:
        problem = f"{kind} cannot be followed without values, so nothing is planned ({error})"
        raise InputError("--model", problem) from error


def _too_much(sizes: Sizes, layout: dict[str, Any], fleet: Fleet) -> bool:
    """Whether what is always there does not fit, whatever the batch."""
    held = steady(sizes, Zero.of(layout, fleet.ranks, fleet.device.on_cpu, False))
    return held.device.total() > (1 - MARGIN) * fleet.device.memory


def _rates(fleet: Fleet) -> list[str]:
    """What a step's seconds are made of, for people."""
    device, share = fleet.device, fleet.arithmetic / fleet.device.flops
    reached = "is taken to reach" if fleet.reached is None else "reaches"
    told = "as measured" if device.on_cpu else f"of which {time.BANDWIDTH_SHARE:.0%} are reached"
    between = f"{device.link / 1e9:.4g} GB/s within a host"
    if fleet.hosts > 1:
        between += f", {fleet.local} x {device.network / 1e9:.4g} GB/s out of it"
    hops = f"{time.HOP * 1e6:.2g} us a hop within a host, {time.NETWORK_HOP * 1e6:.2g} us between hosts"
    start = time.CPU_START if device.on_cpu else time.START
    hidden = "nothing of" if device.on_cpu else f"{time.OVERLAP:.0%} at most of"
    return [
        f"arithmetic {reached} {share:.0%} of {device.flops / 1e12:,.4g} TFLOP/s (--mfu says how much)",
        f"collectives are rings of {between}, {told}",
        f"each begins after {start * 1e6:.0f} us and {hops}; arithmetic hides {hidden} it",
        f"{device.memory / 1e9:,.0f} GB of memory each, {MARGIN:.0%} of it left free",
    ]
