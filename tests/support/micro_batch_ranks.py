"""One rank of pre-training runs whose micro-batch is found and tried: `micro_batch_ranks.py runs.json`, a list of runs.

A run is {config, ds_config, short, room, like, fails}: `short` has memory taken for short, so that a plan is made;
`room` is what each rank is told that it may take, in bytes; `like` takes the micro-batch that the run with this `out`
found; `fails` has the trial run out of memory. `config.out`.json gets {found, message}.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.objectives.objective import Objective
from recyclable.recipes.pretrain import pretrain
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.training import micro_batch


def main(file: str) -> int:
    distributed.init()
    for run in json.loads(Path(file).read_text()):
        config, outcome = read_pretrain_settings(run["config"], file), {"found": None, "message": None}
        ds_config = run["ds_config"]
        if like := run.get("like"):
            ds_config = {**ds_config, micro_batch.MICRO: json.loads(Path(f"{like}.json").read_text())["found"]}
        with disturbed(run, outcome):
            try:
                pretrain(config, ds_config)
            except InputError as error:
                outcome["message"] = str(error)
        if distributed.is_main():
            Path(f"{config.out}.json").write_text(json.dumps(outcome))
        distributed.barrier()
    distributed.shutdown()
    return 0


def disturbed(run: dict[str, Any], outcome: dict[str, Any]) -> ExitStack:
    """What a run asked for, while it lasts; notes what was found."""
    fleet, find = micro_batch._fleet, micro_batch.find

    def told(objective: Objective) -> Any:
        here = fleet(objective)
        return replace(here, device=replace(here.device, memory=run.get("room") or here.device.memory))

    def noted(*given: Any) -> Any:
        ds_config, found = find(*given)
        outcome["found"] = ds_config.get(micro_batch.MICRO)
        return ds_config, found

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    changed: dict[str, Any] = {"_plainly_fits": lambda *_: not run.get("short"), "_fleet": told, "find": noted}
    if run.get("fails"):
        changed["to_device"] = out_of_memory
    stack = ExitStack()
    stack.enter_context(patch.multiple(micro_batch, **changed))
    return stack


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
