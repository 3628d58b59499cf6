"""The run config of `recyclable stack`: one base, and the runs of `tune` whose adapters are trained on it at once."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from recyclable import machine
from recyclable.config.run_file import make_config
from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.recipes.tune_settings import TuneSettings, read_tune_settings

_OF_MODEL = ("dropout", "attn_implementation", "gradient_checkpointing")
_OF_STACK = ("base", "out", "save_every", "save_every_minutes", "save_total_limit", *_OF_MODEL)
_OF_ONE = ("dataloader_num_workers", "dataloader_prefetch_factor")
_TAKEN = ("checkpoints", "profile", "run.json", "stack.json", "best-*.safetensors")
"""What a stack has in `out` itself, beside hidden files."""
_LONGEST = 255
"""Bytes of a directory's name."""
_OF_RUN = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


class StackSettings(Settings):
    """Several adapters on one frozen base in one run."""

    purpose: ClassVar[str] = "stack"

    out: Path
    """Directory the results go to, each into one of its run's name."""
    base: str
    """The model that all adapters are for."""
    shared: dict[str, Any] = Field({})
    """Settings of `tune` that all runs have."""
    runs: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> settings of `tune` that are this run's own; they win over the shared ones."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Replaces every dropout rate of the base; null keeps the base's own. What is drawn differs from a run alone."""
    attn_implementation: str | None = None
    """As for `tune`."""
    gradient_checkpointing: bool | None = None
    """As for `tune`."""
    save_every: int = Field(500, ge=0)
    """Steps between checkpoints of all runs together; 0 writes none by steps."""
    save_every_minutes: float | None = Field(None, gt=0)
    """Minutes between checkpoints, besides; null: by steps alone."""
    save_total_limit: int = Field(2, ge=1)
    """How many checkpoints stay."""

    def tunes(self) -> dict[str, TuneSettings]:
        """Name -> the run as `tune` would have it alone."""
        return {name: self._tune(name, own) for name, own in self.runs.items()}

    def _tune(self, name: str, own: dict[str, Any]) -> TuneSettings:
        _require_directory(name)
        given = {"tuning": "lora", **self.shared, **own}
        where = f"runs.{name}"
        for key in _OF_STACK:
            if key in given:
                raise InputError(where, f"{key} is given, but it is the whole stack's")
        for key in _OF_ONE:
            if key in given:
                raise InputError(where, f"{key} is given, but a stack's ranks make their batches themselves")
        of_model = {key: getattr(self, key) for key in _OF_MODEL if getattr(self, key) is not None}
        tuned = read_tune_settings({**given, **of_model, "base": self.base, "out": str(self.out / name)}, where)
        if tuned.tuning != "lora" or getattr(tuned, "use_dora", False):
            kind = "DoRA" if tuned.tuning == "lora" else repr(tuned.tuning)
            raise InputError(where, f"tuning is {kind}, expected 'lora' in a stack: run `recyclable tune` for others")
        if tuned.torch_compile:
            raise InputError(where, "torch_compile is true, but a stack's layers are not compiled: remove it")
        if tuned.logits != "fp32":
            raise InputError(where, "logits is bf16, but those of a stack are in fp32: remove it")
        return tuned


def _require_directory(name: str) -> None:
    """InputError for what cannot be a run's directory in `out`."""
    hidden = not name.strip() or name.startswith(".")
    if hidden or "/" in name or not name.isprintable() or len(os.fsencode(name)) > _LONGEST:
        raise InputError("runs", f"has a run called {name!r}, expected names of directories")
    if any(fnmatchcase(name, taken) for taken in _TAKEN):
        raise InputError("runs", f"has a run called {name!r}, which a stack has in `out` itself: expected another name")


def read_stack_settings(content: dict[str, Any], where: object) -> StackSettings:
    """Raises InputError, for any of the runs as well."""
    settings = make_config(StackSettings, content, where)
    settings.tunes()
    return settings


def require_ds_config(ds_config: dict[str, Any], world_size: int, gradient_checkpointing: bool | None) -> None:
    """InputError for all that a ds_config must not say to a stack, whose runs have batches and clipping of their own.

    Args:
        gradient_checkpointing: from the run config; None leaves it to the ds_config.
    """
    where, rows = "ds_config", "train_micro_batch_size_per_gpu"
    for key in _OF_RUN:
        if key in ds_config:
            raise InputError(where, f"{key} is given, but in a stack it is each run's own: remove it here")
    for key in _MONITORS:
        section = ds_config.get(key, {})
        if not isinstance(section, dict) or section.get("enabled"):
            raise InputError(where, f"{key} is given, but a stack's runs write tensorboard/ alone: remove it here")
    machine.whole_number(ds_config, rows, where)
    machine.merge(
        {**ds_config, rows: 1},  # those of a pass are of several runs
        where=where,
        train_batch_size=world_size,
        max_grad_norm=0.0,
        world_size=world_size,
        gradient_checkpointing=gradient_checkpointing,
        run="the run config",
    )
