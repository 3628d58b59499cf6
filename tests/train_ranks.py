"""One rank of many small training runs in one process group: `train_ranks.py runs.json`, a list of runs.

A run is {verb, config, ds_config, resume, raise_at, slow}: `raise_at` makes it fail after that step, as a full disk
would, `slow` adds so many seconds to each step. What a run ended with is written to `config.out`.json: {} or
{error, message}.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from recyclable.config import make_config
from recyclable.errors import InputError
from recyclable.rank import RUN_CONFIGS
from recyclable.training import distributed
from recyclable.training.monitor import Monitor


class Interrupted(Exception):
    """Raised by a run that was told to."""


def main(file: str) -> int:
    distributed.init()
    untouched = Monitor.step
    for run in json.loads(Path(file).read_text()):
        Monitor.step = disturbed(untouched, run.get("raise_at"), run.get("slow", 0))
        config = make_config(RUN_CONFIGS[run["verb"]], run["config"], file)
        outcome = {}
        try:
            recipe = getattr(import_module(f"recyclable.recipes.{run['verb']}"), run["verb"])
            recipe(config, run["ds_config"], run.get("resume", False))
        except (InputError, Interrupted) as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        if distributed.is_main():
            Path(f"{config.out}.json").write_text(json.dumps(outcome))
    distributed.shutdown()
    return 0


def disturbed(original: Any, raise_at: int | None, slow: float) -> Any:
    """`Monitor.step`, which the loop calls after each step, with what a run asked for."""

    def step(self: Monitor, step: int, *losses: Any) -> None:
        original(self, step, *losses)
        time.sleep(slow)
        if step == raise_at:
            raise Interrupted(f"at step {step}")

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
