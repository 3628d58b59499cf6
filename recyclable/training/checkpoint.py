"""Checkpoints that are whole or ignored: written aside, digested, marked complete, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.training.swapped import is_swapped, load_states, save_states
from recyclable.weights.durable import sync, write_json
from recyclable.weights.hashes import sha256_file
from recyclable.weights.strict_json import read_json

_MARK = "complete.json"
_TAG = "engine"


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, state: dict[str, Any]) -> None:
    """Write folder/step-N (N = state["step"]) and drop older checkpoints; a collective. Frozen weights are left out."""
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f".partial-{final.name}"
    if distributed.is_main():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    if is_swapped(engine.optimizer):
        save_states(engine.optimizer, aside)
    else:
        engine.save_checkpoint(str(aside), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    distributed.barrier()
    if distributed.is_main():
        files = {str(p.relative_to(aside)): sha256_file(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        for name in files:
            sync(aside / name)
        micro = {"micro_batch": engine.train_micro_batch_size_per_gpu()}
        write_json(aside / _MARK, {**state, **micro, **_shape_of_run(engine), "files": files})
        if final.exists():  # a resumed run repeats the steps after its checkpoint
            shutil.rmtree(final)
        os.replace(aside, final)
        sync(folder)
        for old in _steps(folder)[:-1]:
            shutil.rmtree(old)
    distributed.barrier()


def micro_batch(folder: Path) -> int | None:
    """The micro-batch that the last complete checkpoint was written with; None without one, or where it is not told."""
    steps = _steps(folder)
    return read_json(steps[-1] / _MARK).get("micro_batch") if steps else None


def load_latest(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, Any] | None:
    """Load the last complete checkpoint into the engine and return its state, None when there is none; a collective.

    DeepSpeed's files are pickles: they are opened only after their digests have been found to be the recorded ones.
    """
    steps = _steps(folder)
    if not steps:
        return None
    state = read_json(steps[-1] / _MARK)
    if not (isinstance(state.get("files"), dict) and state["files"]):
        problem = f"files is {state.get('files')!r}, expected the checkpoint's files and their SHA-256"
        raise InputError(steps[-1] / _MARK, problem)
    for key, value in _shape_of_run(engine).items():
        if state.get(key, value) != value:
            raise InputError(steps[-1], f"was written with {key} {state[key]}, this run has {value}")
    with distributed.main_first():
        for name, digest in state["files"].items() if distributed.is_main() else ():
            if not (steps[-1] / name).is_file():
                raise InputError(steps[-1] / name, "is missing, but the checkpoint's list has it")
            if sha256_file(steps[-1] / name) != digest:
                raise InputError(steps[-1] / name, "was changed after it was written (SHA-256 differs)")
    if is_swapped(engine.optimizer):
        load_states(engine.optimizer, steps[-1])
    else:
        engine.load_checkpoint(str(steps[-1]), tag=_TAG, load_module_strict=False)
    return state


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _MARK).is_file())


def _shape_of_run(engine: deepspeed.DeepSpeedEngine) -> dict[str, int | str]:
    """What decides how DeepSpeed cuts and names its files."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    stage = engine.zero_optimization_stage()
    states = "by group" if is_swapped(engine.optimizer) else "whole"
    return {"ranks": distributed.world_size(), "zero_stage": stage, "precision": precision, "states": states}
