"""One rank of `recyclable doctor`'s trial between hosts: joins the others as a run would, and times all-reduces.

`python -m recyclable.recipes.trial [run.yaml key=value ...]`, with RANK and its like set, one on each host; JSON on the
last line. What the run config names is compared as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recyclable import distributed
from recyclable.config.run_file import read_run_file
from recyclable.disks import hosts, keeper
from recyclable.errors import InputError
from recyclable.recipes.same_inputs import require_same_inputs

_SMALL_TIMES, _LARGE_TIMES = 20, 3
_LARGE = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Numbers in fp32: 16 and 256 MiB."""
_VERBS = {"method": "recycle", "corpus": "pretrain", "experiments": "study", "runs": "stack"}
"""A key of a run config -> whose it is."""


def trial(run: str | None, overrides: list[str]) -> dict[str, Any]:
    """What torch has here, how all-reduces do over the ranks, what is wrong with what the run reads; a collective.

    Returns `right` (the sums are), `latency_ms` of one number, `mb_per_s`: bytes of the vector over the time it takes.
    """
    ranks, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    large = (torch.arange(_LARGE[device], device=device) % 64).float()
    wanted = large * (ranks * (ranks + 1) // 2)  # exact in fp32
    latency = statistics.median(_seconds(torch.zeros(1, device=device)) for _ in range(_SMALL_TIMES))
    best, right = float("inf"), True
    for _ in range(_LARGE_TIMES):
        sent = large * (rank + 1)
        best = min(best, _seconds(sent))
        right &= bool(torch.equal(sent, wanted))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "backend": dist.get_backend(),
        "bf16": device == "cuda" and torch.cuda.is_bf16_supported(),
        "right": right,
        "latency_ms": 1e3 * latency,
        "mb_per_s": large.nbytes / best / 1e6,
        "run": None if run is None else _wrong_with(run, overrides),
    }


def _seconds(tensor: torch.Tensor) -> float:
    """What an all-reduce of it takes, from when all ranks are there."""
    distributed.barrier()
    begin = time.perf_counter()
    distributed.sum_over_ranks(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _wrong_with(run: str, overrides: list[str]) -> str:
    """What is wrong with a run's inputs, and with where it goes; empty where nothing is."""
    try:
        settings = distributed.agreed(lambda: _settings(run, overrides))
        require_same_inputs(settings)
        _require_shared(settings.out)
    except InputError as error:
        return str(error)
    return ""


def _settings(run: str, overrides: list[str]) -> Any:
    content = read_run_file(run, overrides)
    verb = next((verb for key, verb in _VERBS.items() if key in content), "tune")
    return getattr(import_module(f"recyclable.recipes.{verb}_settings"), f"read_{verb}_settings")(content, run)


def _require_shared(out: Path) -> None:
    """InputError, the same on every rank, where hosts do not share the directory that `out` is, or will be, in."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    there = distributed.broadcast_object(there)
    shared = distributed.Ranks().gather(keeper(there) == 0)
    if not all(shared):
        blind = ", ".join(host for host, sees in zip(hosts(), shared, strict=True) if not sees)
        raise InputError("out", f"{there} is not on a file system that all hosts share: not seen by {blind}")


if __name__ == "__main__":
    distributed.init()
    found = trial(sys.argv[1] if sys.argv[1:] else None, sys.argv[2:])
    distributed.shutdown()
    print(json.dumps(found), flush=True)
