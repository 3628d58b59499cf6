"""Looks at a step's loss and gradients before they reach the weights: a bad step is left out, and its batch is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import deepspeed
import torch

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.data.examples import Batch
from recyclable.data.order import Item
from recyclable.errors import RunError
from recyclable.training.checkpoint.record import Progress
from recyclable.training.states import scaling, set_scaling
from recyclable.weights.durable import write_json
from recyclable.weights.files import write_tensors
from recyclable.weights.team import Team

FOLDER = "bad_steps"
"""Beside a run's other files."""
WINDOW = 100
"""Steps whose median loss a spike is measured by; the first `_LEAST` are not looked at."""
_LEAST = 10
_SCALINGS = 64
"""fp16 begins with far too large a loss scale and halves it at every overflow: at most some 30 times in a row."""


class Health:
    """Takes a run's optimizer steps, but for bad ones: those leave weights, moments and Adam's count as they were.

    A step is bad where the loss or the norm of the gradients is no finite number, or the loss a spike. All ranks see
    the same numbers. DeepSpeed leaves out steps of an infinite norm at some stages and in some precisions; here it is
    so at all, and the optimizer's arithmetic is never asked for a bad step. Overflows that a changing loss scale (fp16)
    is there to find are counted, and are no bad steps.

    Args:
        progress: is told of what is left out, as checkpoints have it.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, settings: TrainSettings, progress: Progress, out: Path
    ) -> None:
        self._engine, self._settings, self._progress, self._out = engine, settings, progress, out
        self._overflows = 0  # in a row
        self.fine = True
        """Whether the last step was none that is left out."""
        scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # the run ends here, in one line

    def step(self, sums: torch.Tensor, counts: torch.Tensor, batches: Sequence[Batch], items: Sequence[Item]) -> None:
        """Take a step whose gradients are complete, or leave it out; a collective.

        Args:
            sums: this rank's summed losses [terms] (fp64).
            counts: all ranks' counts [terms] (fp64).
            batches: this rank's micro-batches.
            items: the examples of the whole step.

        Raises RunError on every rank where the settings say so, or one bad step follows another.
        """
        loss, norm = self._numbers(sums, counts)
        problem = wrong_with(loss, norm, self._settings, self._progress)
        scaled, before = scaling(self._engine), self._autocast_scale()
        with patch.object(self._engine.basic_optimizer, "step", _nothing) if problem else nullcontext():
            self._engine.step()
        if problem:
            set_scaling(self._engine, scaled)  # which knows nothing of losses
        elif getattr(self._engine.optimizer, "overflow", False) or self._autocast_scale() < before:
            self._overflows += 1
            if (scaled or before) and self._overflows < _SCALINGS:
                self._progress.overflows += 1
                self.fine = True
                return
            problem = "the norm of the gradients is no finite number"
        else:
            self._overflows = 0
        self.fine = not problem
        if problem:
            self._leave_out(problem, loss, batches, items)
        else:
            remember(loss, self._settings, self._progress)

    def _autocast_scale(self) -> float:
        """Of torch's own loss scaling (fp16 autocast at stage 0), which falls where it has left out a step; else 0."""
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        return float(scaler.get_scale()) if scaler else 0.0

    def _numbers(self, sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
        """The step's loss and, where DeepSpeed does not look at it, the norm of its gradients (else 0)."""
        own = torch.cat([sums, _own_norm(self._engine, sums)])
        told = torch.cat([distributed.sum_over_ranks(own), counts.clamp(min=1)]).tolist()  # a GPU is waited for once
        totals, norm, each = told[: len(sums)], told[len(sums)], told[len(sums) + 1 :]
        losses = zip(self._engine.module.weights.values(), totals, each, strict=True)
        return sum(weight * total / count for weight, total, count in losses), norm

    def _leave_out(self, problem: str, loss: float, batches: Sequence[Batch], items: Sequence[Item]) -> None:
        progress, settings = self._progress, self._settings
        step = progress.step + 1
        team = distributed.Ranks()
        distributed.agreed_write(lambda: keep_batch(self._out, step, problem, loss, batches, items, team))
        kept = f"its batch is in {self._out / FOLDER}"
        if settings.bad_step == "stop":
            hint = "look at it, then go on with --resume, which tries it again, and bad_step=skip where it stays bad"
            raise RunError(f"step {step}", f"{problem}; no weight was changed by it, {kept}: {hint}")
        progress.skipped.append(step)
        if too_many(settings, progress):
            most = f"more than max_bad_steps={settings.max_bad_steps} in a row are bad: nothing is learned any more"
            raise RunError(f"step {step}", f"{problem}; {most}; {kept}")
        distributed.say(f"notice: step {step} is left out: {problem}; {kept}")


def wrong_with(loss: float, norm: float, settings: TrainSettings, progress: Progress) -> str | None:
    """What is wrong with a step of such a loss and norm of the gradients, if anything."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the norm of the gradients is {norm}"
    factor, recent = settings.spike_factor, progress.recent
    if factor is not None and len(recent) >= _LEAST and loss > factor * (usual := median(recent)):
        return f"the loss is {loss:.4g}, more than {factor:g} times the median of the last {len(recent)}, {usual:.4g}"
    return None


def remember(loss: float, settings: TrainSettings, progress: Progress) -> None:
    """Have the loss of a good step among those that a spike is measured by."""
    if settings.spike_factor is not None:
        progress.recent = [*progress.recent, loss][-WINDOW:]


def too_many(settings: TrainSettings, progress: Progress) -> bool:
    """Whether more of the last steps that were left out follow each other than may."""
    last, in_a_row = progress.skipped[-1], 1
    while last - in_a_row in progress.skipped:
        in_a_row += 1
    return in_a_row > settings.max_bad_steps


def keep_batch(
    out: Path, step: int, problem: str, loss: float, batches: Sequence[Batch], items: Sequence[Item], team: Team
) -> None:
    """Every rank of a team leaves its micro-batches for people to look at, the first what they are made of."""
    folder, name = out / FOLDER, f"step-{step:08d}"
    folder.mkdir(exist_ok=True)
    tensors = {f"{number}.{of}": tensor for number, batch in enumerate(batches) for of, tensor in batch.items()}
    write_tensors(folder / f"{name}-rank-{team.rank:05d}.safetensors", tensors)
    if team.rank == 0:
        told = loss if math.isfinite(loss) else str(loss)
        examples = [{"epoch": epoch, "example": example} for epoch, example in items]
        write_json(folder / f"{name}.json", {"step": step, "problem": problem, "loss": told, "examples": examples})


def _own_norm(engine: deepspeed.DeepSpeedEngine, like: torch.Tensor) -> torch.Tensor:
    """[1], as this tensor: the norm of the gradients in fp32 at stage 0, where each rank has them all and DeepSpeed
    looks at none."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer) or engine.torch_autocast_z0_gradscaler:
        return like.new_zeros(1)
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).reshape(1).to(like)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of the optimizer's arithmetic."""
