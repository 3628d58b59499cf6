"""Ours in a comparison of training steps: `recyclable pretrain` as it is, stopped between turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from training_case import Case
from training_turns import Gate


def ours(case: Case, folder: Path, port: int) -> None:
    """What one rank does; between turns it times the last warm step's matrix products alone, on a CPU."""
    import torch
    from deepspeed.monitor.monitor import MonitorMaster
    from training_products import Products

    from recyclable import distributed
    from recyclable.recipes.pretrain import pretrain
    from recyclable.recipes.pretrain_settings import read_pretrain_settings
    from recyclable.training.monitor import Monitor

    distributed.init()
    products, on_gpu = Products(), torch.cuda.is_available()  # there compiled code would mind being watched
    gate = Gate(port, case, products.seconds)
    step, write = Monitor.step, MonitorMaster.write_events

    def stepped(monitor: Monitor, *given: Any) -> None:
        step(monitor, *given)
        if gate.steps == case.warm - 1 and not on_gpu:  # the last warm step is about to end, and is counted
            products.__exit__(None, None, None)
        gate.step()
        if gate.steps == case.warm - 1 and not on_gpu:
            products.__enter__()

    def written(monitor: MonitorMaster, events: list[tuple[str, float, int]]) -> None:
        gate.losses.update({number: float(value) for name, value, number in events if name == "train/loss"})
        write(monitor, events)

    settings = read_pretrain_settings(case.run(folder / "out"), "benchmark")
    with patch.object(Monitor, "step", stepped), patch.object(MonitorMaster, "write_events", written):
        pretrain(settings, case.ds_config())
