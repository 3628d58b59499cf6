"""One rank of many small training runs in one process group: `train_ranks.py runs.json`, a list of runs.

A run is {verb, config, ds_config, resume, raise_at, slow, look, lora, replace, items, spoil, late, outcome}: `raise_at`
makes it fail after that step, as a full disk would, `slow` adds so many seconds to each step, `lora` pre-trains a LoRA
on the frozen base and keeps it as lora.safetensors, `replace` has another file in the place of one while it lasts,
`items` names a file to which each rank adds what it trains on, `spoil` is for `spoiled`, `late` has numbers of a step
come as late as a GPU's, of engines that decide on the device. What a run ended with is written to
`outcome`.json (None: `config.out`): {} or {error, message}; with `look` also what rank 0 held after each step.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model

from recyclable import distributed
from recyclable.data.order import share_of_step
from recyclable.errors import InputError
from recyclable.lm.masked import Masked
from recyclable.objectives.labelled import LabelledTask
from recyclable.training import feeding, loop
from recyclable.training.monitor import Monitor
from recyclable.weights.sources import fill


class Interrupted(Exception):
    """Raised by a run that was told to."""


def main(file: str) -> int:
    distributed.init()
    untouched = Monitor.step
    for run in json.loads(Path(file).read_text()):
        outcome: dict[str, Any] = {}
        held = outcome.setdefault("held", []) if run.get("look") else None
        Monitor.step = disturbed(untouched, run.get("raise_at"), run.get("slow", 0), held)
        verb = run["verb"]
        recipe, settings = (import_module(f"recyclable.recipes.{name}") for name in (verb, f"{verb}_settings"))
        config = getattr(settings, f"read_{verb}_settings")(run["config"], file)
        gc.freeze()  # what was imported is not looked through whenever an engine ends, a quarter of a second each time
        try:
            with (
                lora_student(recipe) if run.get("lora") else nullcontext(),
                replaced(*run.get("replace", ())),
                noted(run.get("items")),
                spoiled(run.get("spoil", {})),
                patch.object(distributed.Coming, "pending", True) if run.get("late") else nullcontext(),
            ):
                getattr(recipe, verb)(config, run["ds_config"], run.get("resume", False))
        except (InputError, Interrupted) as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        if distributed.is_main():
            Path(f"{run.get('outcome', config.out)}.json").write_text(json.dumps(outcome))
    distributed.shutdown()
    gc.unfreeze()  # else Triton's bindings call it leaked
    return 0


def disturbed(original: Any, raise_at: int | None, slow: float, held: list[dict[str, int]] | None) -> Any:
    """`Monitor.step`, which the loop calls after each step, with what a run asked for."""

    def step(self: Monitor, step: int, *losses: Any) -> None:
        original(self, step, *losses)
        time.sleep(slow)
        if held is not None:
            held.append(holdings(self._engine))
        if step == raise_at:
            raise Interrupted(f"at step {step}")

    return step


@contextmanager
def lora_student(pretrain: Any) -> Iterator[None]:
    """Pre-training of LoRA weights alone, which no recipe does: the parts of the recipe exchanged while it lasts."""
    whole = Masked.objective

    def objective(kind: Masked, model: torch.nn.Module, *more: Any) -> Any:
        return whole(kind, with_lora(model), *more)

    def keep(_: str, outcome: Any, __: Any, ___: Any, config: Any, *____: Any) -> None:
        heldout = {when: {"loss": outcome.history[i]["loss"]} for when, i in (("before", 0), ("after", -1))}
        if distributed.is_main():
            shutil.copyfile(outcome.tensors, config.out / "lora.safetensors")
            (config.out / "lora.json").write_text(json.dumps({"heldout": heldout}))
        distributed.barrier()

    with (
        patch.object(Masked, "objective", objective),
        patch.multiple(pretrain, _save=keep, _lineage=lambda _: {}),  # no base is written, so there is no lineage
    ):
        yield


@contextmanager
def replaced(path: str = "", other: str = "") -> Iterator[None]:
    """While it lasts, `other` is at `path`; one process alone."""
    if path:
        Path(path).rename(f"{path}.aside")
        Path(other).rename(path)
    try:
        yield
    finally:
        if path:
            Path(path).rename(other)
            Path(f"{path}.aside").rename(path)


@contextmanager
def noted(file: str | None) -> Iterator[None]:
    """While it lasts, a line per step with this rank's micro-batches goes to `file`-rank."""
    if file is None:
        yield
        return

    def share(*arguments: Any) -> Any:
        found = share_of_step(*arguments)
        with Path(f"{file}-{distributed.rank()}").open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        return found

    with patch.object(feeding, "share_of_step", share):
        yield


@contextmanager
def spoiled(steps: dict[str, str]) -> Iterator[None]:
    """While it lasts, some steps (from 0) of tuning are bad on the last rank.

    Args:
        steps: what is bad of each: the `loss` is NaN; it is `infinite`; the `gradient` alone is NaN; a `spike`: the
            loss is 50 times as large; `absent`: the step is not there at all.
    """
    now = ""
    taken, honest = loop.train_step, LabelledTask.sums

    def step(engine: Any, objective: Any, fed: Any, number: int, *more: Any) -> Any:
        nonlocal now
        now = str(number)
        if steps.get(now) == "absent":
            nothing = (torch.zeros(shape, dtype=torch.float64) for shape in ((1,), (1,), ()))
            return (*nothing, distributed.Coming(torch.zeros(())))
        return taken(engine, objective, fed, number, *more)

    def sums(self: LabelledTask, batch: Any) -> dict[str, torch.Tensor]:
        found, how = honest(self, batch), steps.get(now)
        if how is None or distributed.rank() < distributed.world_size() - 1 or not torch.is_grad_enabled():
            return found
        if how == "gradient":
            found["task"].register_hook(lambda gradient: gradient * float("nan"))
            return found
        return {"task": found["task"] * {"loss": float("nan"), "infinite": float("inf"), "spike": 50.0}[how]}

    with patch.object(loop, "train_step", step), patch.object(LabelledTask, "sums", sums):
        yield


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """The same LoRA weights wherever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(fill(model), LoraConfig(r=4, target_modules=["query", "value"]))


def holdings(engine: Any) -> dict[str, int]:
    """Elements that this rank holds: of the teacher's weights, of the optimizer's moments, of all tensors there are."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    moments = engine.optimizer.optimizer.state.values()
    return {
        "teacher": sum(p.numel() + p.ds_tensor.numel() for p in engine.module.teacher.parameters()),
        "moments": sum(tensor.numel() for state in moments for tensor in (state["exp_avg"], state["exp_avg_sq"])),
        "all": sum(tensor.numel() for tensor in tensors),
        "tensors": len(tensors),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
