"""Optimizer steps of ranks that have everything whole (stage 0): few kernels, and the numbers of ZeRO's stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from recyclable import distributed
from recyclable.machine import MASTERED_AT_ONCE

_MASTER = "fp32_master"
_JUDGE = "judge"
Judge = Callable[[torch.Tensor], torch.Tensor]
"""The norm of a step's gradients [] (fp32) -> whether the step is to be left out [] (bool), both on the device."""


class MasterOptimizer(FP16_UnfusedOptimizer):
    """Steps fp32 masters of bf16 weights with fused AdamW, as ZeRO's stages do; DeepSpeed's own at stage 0 does not.

    That one takes a step before the first, with gradients of zero: weights decay once more, and Adam counts one step
    too many. It also asks the device about each gradient; this one asks nothing, and no step of it is an `overflow`.
    """

    def initialize_optimizer_states(self) -> None:
        """None before the first step."""
        self._pieces: list[list[tuple[nn.Parameter, nn.Parameter]]] = []
        room = 0
        for half, full in zip(self.fp16_groups, self.fp32_groups, strict=True):
            for parameter, master in zip(half, full, strict=True):
                setattr(parameter, _MASTER, master)
                if not self._pieces or parameter.numel() > room:
                    self._pieces.append([])
                    room = MASTERED_AT_ONCE
                self._pieces[-1].append((parameter, master))
                room -= parameter.numel()

    def destroy(self) -> None:
        """Leave parameters without masters again."""
        for parameter, _ in (pair for piece in self._pieces for pair in piece):
            delattr(parameter, _MASTER)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, and step, or leave masters as they were."""
        self._global_grad_norm = _norm([parameter for piece in self._pieces for parameter, _ in piece])
        _tell(self.optimizer, self._global_grad_norm, self.clip_grad)
        for piece in self._pieces:
            halves, masters = map(list, zip(*piece, strict=True))
            _fill_gaps(halves)
            for master in masters:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([master.grad for master in masters], [half.grad for half in halves])
            _let_go(halves)
            self.optimizer.step()
            _let_go(masters)
            torch._foreach_copy_(halves, masters)


def master_of(parameter: nn.Parameter) -> torch.Tensor:
    """The fp32 values of a parameter that an engine trains whole: its master's where it has one."""
    return getattr(parameter, _MASTER, parameter)


@contextmanager
def with_masters() -> Iterator[None]:
    """While it lasts DeepSpeed makes engines at stage 0 with `MasterOptimizer`."""
    with patch.object(deepspeed.runtime.engine, "FP16_UnfusedOptimizer", MasterOptimizer):
        yield


def simplify(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have an engine at stage 0 do no more than it has to."""
    if distributed.world_size() == 1:
        engine.enable_backward_allreduce = False  # it would copy every gradient to add up one rank's
    if _is_plain(engine):
        engine.clip_fp32_gradients = lambda: None  # tensor by tensor, and nobody learns the norm
        engine.optimizer.register_step_pre_hook(partial(_before_step, engine))


def can_leave_out(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether an engine's steps can be left out with no word from the host (`step_unless`)."""
    return isinstance(engine.optimizer, MasterOptimizer) or _is_plain(engine)


def step_unless(engine: deepspeed.DeepSpeedEngine, is_bad: Judge) -> torch.Tensor:
    """Take an engine's step unless it is bad, which is told [] (bool); the host waits for nothing.

    Steps of `engine.step` itself are left out where the norm of the gradients is no finite number.
    """
    with patch.object(engine.basic_optimizer, _JUDGE, is_bad, create=True):
        engine.step()
    return engine.basic_optimizer.found_inf.bool()


def _is_plain(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the parameters themselves are what fused AdamW steps, and nothing scales losses."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return isinstance(engine.optimizer, torch.optim.AdamW) and scaler is None


@torch.no_grad()
def _before_step(engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    engine._global_grad_norm = _norm(parameters)
    _tell(optimizer, engine._global_grad_norm, engine.gradient_clipping())
    _fill_gaps(parameters)


def _norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Of all gradients, in fp32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)))


def _tell(fused: Any, norm: torch.Tensor, limit: float) -> None:
    """Have fused AdamW leave a bad step out, its count included, and else divide gradients on its way where their norm
    is too large: torch's protocol for loss scales."""
    fused.found_inf = getattr(fused, _JUDGE, _is_not_finite)(norm).float()
    fused.grad_scale = ((norm + 1e-6) / limit).clamp(min=1) if limit else None


def _is_not_finite(norm: torch.Tensor) -> torch.Tensor:
    return ~norm.isfinite()


def _fill_gaps(parameters: Sequence[nn.Parameter]) -> None:
    """Give those that losses do not depend on gradients of zero: ZeRO and sums over ranks have them decay as well."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _let_go(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
