"""The settings of `recyclable plan`: which model on which devices, and the run that is planned."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from pydantic import Field, model_validator

from recyclable.architectures.structure import Structure
from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.methods import METHODS
from recyclable.methods.parts.learning import LearnsFromLabels
from recyclable.planning.regimes import NVME_PATH
from recyclable.recipes.pretrain_settings import claimed
from recyclable.weights.base import read_config
from recyclable.weights.locate import locate_config

_BATCH, _LENGTH, _LENGTH_OF_DECODERS = 256, 512, 2048
"""What is planned where nothing says how large a step is, and how long texts are."""

_MOST = 1 << 20
"""Devices, some ten times as many as the largest machines have; each doubling is planned with --scale."""


class PlanSettings(Settings):
    """A model and where it is to run."""

    model: str | None = None
    """A directory with config.json, that file, or a hub name; null: the run's `base`."""
    devices: int = Field(1, gt=0, le=_MOST)
    """Ranks, one a device."""
    hosts: int = Field(1, gt=0, le=_MOST)
    """Hosts that the devices are on, as many on each."""
    device: str | None = None
    """A kind of accelerator, or cpu; null: this machine's."""
    device_memory: str | None = None
    """Of each, as 80GB; null: as the data sheet says, or what is free here."""
    host_memory: str | None = None
    """Of each host that ranks may take; null: as much as its devices have, or what is free here."""
    nvme_path: str = NVME_PATH
    """Directory on the hosts' NVMe, for the regimes that keep things there."""
    verb: Literal["pretrain", "tune", "recycle"] | None = None
    """What is planned; null: as the run's keys say, `pretrain` where there are none."""
    deepspeed_config: str | None = None
    """Plan this one alone: a file, or the name of a shipped one."""
    mfu: float | None = Field(None, gt=0, le=1)
    """Share of a device's FLOP/s that training reaches on one device, as `perf/mfu` tells; null: as is assumed."""
    scale: bool = False
    """Plan 8 devices, 16 and so on up to `devices`, or 1,024, on as many hosts as are needed of the kind."""
    tokens_per_device: int = Field(16_384, gt=0)
    """With scale: of a step, on each device, where no `train_batch_size` says how many all have together."""

    @model_validator(mode="after")
    def _read_by_scale(self) -> PlanSettings:
        if not self.scale:
            self.require_unset(("tokens_per_device",), "without scale")
        return self


def run_settings(plan: PlanSettings, content: dict[str, Any], where: object, whole: bool) -> tuple[Any, list[str]]:
    """The settings of the run that is planned, and what nobody said of it and is assumed.

    Args:
        content: a run config's, of which nothing need be there.
        whole: it is all of one, whose defaults hold; else what it does not say is open.
    """
    keys = "method" in content, "task" in content or "tuning" in content
    verb = plan.verb or ("recycle" if keys[0] else "tune" if keys[1] else "pretrain")
    base = plan.model or content.get("base")
    if not isinstance(base, str):
        raise InputError("--model", "is missing, and so is `base` in a run config: expected one of them")
    config = read_config(locate_config(base))
    run = {"out": "out", "max_steps": 1000, "learning_rate": 1e-4, **content, "base": base}
    if verb == "pretrain":
        run = {"corpus": "corpus", "lm": claimed(config.to_dict()), **run}
    else:
        run = {"task": "task", **run}
    if verb == "recycle":
        run = {"method": "both", "old_base": base, "weights": "weights", **run}
        if not issubclass(METHODS.get(run["method"], where), LearnsFromLabels):
            raise InputError("method", f"{run['method']} trains nothing: nothing to plan")
    read = getattr(import_module(f"recyclable.recipes.{verb}_settings"), f"read_{verb}_settings")
    assumed: list[str] = []
    if whole:
        return read(run, where), assumed
    if "train_batch_size" not in run:
        run["train_batch_size"] = -(-_BATCH // plan.devices) * plan.devices
        assumed.append(f"steps of {run['train_batch_size']} examples (train_batch_size)")
    if "max_length" not in run and verb != "recycle":
        told = _LENGTH_OF_DECODERS if verb == "pretrain" and run["lm"] == "causal" else _LENGTH
        run["max_length"] = min(told, Structure(config).positions or told)
        assumed.append(f"texts of {run['max_length']} tokens (max_length)")
    return read(run, where), assumed
