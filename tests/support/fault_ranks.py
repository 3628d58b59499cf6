"""A rank of `recyclable tune` that something happens to: `fault_ranks.py FAULTS.json run.yaml ...`.

FAULTS.json holds a list, one item for each time the ranks are started: [phase, rank, fault] or null.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from recyclable.launching import guard

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "asked": signal.SIGUSR1}
AT_STEP = 6
PHASES = {
    "start": "recyclable.distributed.init",
    "step": "recyclable.training.monitor.Monitor.step",
    "evaluation": "recyclable.training.loop._evaluate",
    "save": "recyclable.training.checkpoint.saving.write_pieces",
    "end": "recyclable.recipes.adapting.finish",
}
"""Phase -> the function at whose beginning the fault happens."""


def main(faults: Path, argv: list[str]) -> int:
    guard.begin()
    from recyclable.commands.parts.ranks import rank_main

    rank = int(os.environ["RANK"])
    starts = faults.with_name(f"starts-{rank}")
    number = len(starts.read_text()) if starts.exists() else 0
    with starts.open("a") as file:
        file.write(".")
    listed = json.loads(faults.read_text())
    phase, who, fault = (listed[number] if number < len(listed) else None) or ("start", -1, "")
    if who != rank:
        return rank_main("tune", argv)
    with patch(PHASES[phase], interrupted(original(PHASES[phase]), phase, fault)):
        return rank_main("tune", argv)


def original(name: str) -> Callable[..., Any]:
    from pkgutil import resolve_name

    module, _, function = name.rpartition(".")
    return getattr(resolve_name(module), function)


def interrupted(function: Callable[..., Any], phase: str, fault: str) -> Callable[..., Any]:
    """The function, at whose beginning the fault happens; of steps and checkpoints at the one of `AT_STEP`."""

    def instead(*arguments: Any, **named: Any) -> Any:
        place = {"step": lambda: arguments[1], "save": lambda: int(arguments[0].parent.name.split("-")[2])}
        place["evaluation"] = lambda: arguments[2].step
        if phase not in place or place[phase]() == AT_STEP:
            if fault == "raised":
                raise ValueError(f"at {phase}")
            os.kill(os.getpid(), SIGNALS[fault])
        return function(*arguments, **named)

    return instead


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
