"""What an engine's optimizer holds, put together by DeepSpeed's own means: the oracle for what checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from recyclable import distributed
from recyclable.training import states
from recyclable.training.checkpoint.rank_file import RankFiles, write_pieces
from recyclable.training.checkpoint.record import rank_file
from recyclable.training.pieces import MOMENTS, WEIGHT

Values = dict[str, dict[str, torch.Tensor]]


def held(engine: deepspeed.DeepSpeedEngine) -> Values:
    """Kind -> name -> whole values of everything that is trained, and under `model` what it computes with."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed does it a group's step too early
        optimizer._lazy_init_hp_params_optimizer_state()
    found: Values = {kind: {} for kind in (WEIGHT, *MOMENTS, "model")}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found["model"][name] = parameter.detach().clone()
        if isinstance(optimizer, torch.optim.Optimizer):
            own, state = parameter, optimizer.state[parameter]
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            own = master(optimizer, parameter)
            state = optimizer.optimizer.state[own]
        else:
            own = safe_get_full_fp32_param(parameter)
            state = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        found[WEIGHT][name] = own.detach().clone()
        for kind in MOMENTS:
            found[kind][name] = state[kind].detach().clone().view(found["model"][name].shape)
        found[WEIGHT][name] = found[WEIGHT][name].view(found["model"][name].shape)
    return found


def master(optimizer: FP16_UnfusedOptimizer, parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 copy of a parameter that is whole on every rank."""
    for half, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for own, copy in zip(half, full, strict=True):
            if own is parameter:
                return copy
    raise KeyError


def write(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Every rank's file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pieces(folder / rank_file(distributed.rank()), states.copies(engine))
    distributed.barrier()


def read(engine: deepspeed.DeepSpeedEngine, folder: Path) -> RankFiles:
    """All ranks' files, for the parameters of an engine."""
    return RankFiles(sorted(folder.glob("rank-*")), states.trained_shapes(engine))


def assert_held(engine: deepspeed.DeepSpeedEngine, files: RankFiles, steps: int) -> None:
    """AssertionError unless the engine holds what files say, bit for bit."""
    found = held(engine)
    for kind in (WEIGHT, *MOMENTS):
        assert files.kind(kind).names == sorted(found[kind])
        for name, values in found[kind].items():
            assert torch.equal(values, files.kind(kind)[name]), (kind, name)
    for name, values in found["model"].items():
        assert torch.equal(values, found[WEIGHT][name].to(values.dtype)), f"{name} is not its master, rounded"
        assert files.steps(name) == steps, name
