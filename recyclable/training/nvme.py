"""What offloading to NVMe needs: a directory that can be written to, and DeepSpeed's async_io, compiled once."""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from unittest.mock import patch

import torch

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.weights.durable import remove_empty

_SECTIONS = ("offload_optimizer", "offload_param")


def prepare(ds_config: dict[str, Any], where: str | Path) -> None:
    """Have async_io loaded where the ds_config offloads to NVMe; does nothing else. Every rank calls it.

    Raises InputError for a directory that is missing or cannot be written to, and where async_io cannot be compiled.
    """
    for section, settings in _on_nvme(ds_config).items():
        field, path = f"zero_optimization.{section}.nvme_path", settings.get("nvme_path")
        if path is None:
            raise InputError(where, f"{field} is missing, expected a directory on an NVMe drive")
        try:
            TemporaryFile(dir=path).close()
        except OSError as error:
            problem = f"which cannot be written to ({error.strerror}), expected a directory on an NVMe drive"
            raise InputError(where, f"{field} is {str(path)!r}, {problem}") from error
    if _on_nvme(ds_config) and (reason := _missing()):
        problem = f"offloads to nvme, but DeepSpeed's async_io cannot be compiled here: {reason}"
        raise InputError(where, problem)


def with_own_folder(ds_config: dict[str, Any], engine: str) -> dict[str, Any]:
    """The ds_config with a folder of this run's own in each `nvme_path`, so that runs there do not see each other.

    Args:
        engine: which of the run's it is for: DeepSpeed empties a folder when it begins, and several may be in use.
    """
    found = copy.deepcopy(ds_config)
    for settings in _on_nvme(found).values():
        settings["nvme_path"] = str(Path(settings["nvme_path"]) / f"{_own_name()}-{engine}")
    return found


def clear(ds_config: dict[str, Any]) -> None:
    """Remove what this rank keeps in the folder of `with_own_folder`."""
    for settings in _on_nvme(ds_config).values():
        own = Path(settings["nvme_path"])
        kept = list(own.glob(f"**/rank{distributed.rank()}"))
        for folder in kept:
            shutil.rmtree(folder, ignore_errors=True)
        remove_empty([*{folder.parent for folder in kept}, own / "zero_stage_3", own])


def _on_nvme(ds_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    zero = ds_config.get("zero_optimization") or {}
    found = {name: zero[name] for name in _SECTIONS if isinstance(zero.get(name), dict)}
    return {name: settings for name, settings in found.items() if settings.get("device") == "nvme"}


def _own_name() -> str:
    """The same on all ranks of a run; of runs at the same time each has a port of its own."""
    return "recyclable-" + "-".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))


@cache
def _missing() -> str:
    """Why async_io cannot be had; empty where it is loaded now. One process compiles at a time, where nobody else does.

    A process that is killed while it compiles leaves a `lock`, on which torch would wait for ever: whoever holds our
    own lock, which ends with its process, knows that no one is at work behind a file of that name.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    own = root / f"recyclable-torch-{torch.__version__}"
    own.mkdir(parents=True, exist_ok=True)
    builder = AsyncIOBuilder()
    with (own / ".one-at-a-time").open("w") as turn, patch.dict(os.environ, TORCH_EXTENSIONS_DIR=str(own)):
        fcntl.flock(turn, fcntl.LOCK_EX)
        for stale in own.glob("*/lock"):
            stale.unlink()
        if not builder.is_compatible(verbose=False):
            return "libaio and its headers are missing (on Debian: apt install libaio-dev)"
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError) as error:
            return str(error).splitlines()[0]
    return ""
