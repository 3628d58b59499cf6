"""Looks at a step's loss and gradients before they reach the weights: a bad step is left out, and its batch is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import deepspeed
import torch

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.data.examples import Batch
from recyclable.data.order import Item
from recyclable.errors import RunError
from recyclable.training import whole
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


class _Untold(NamedTuple):
    """A step that the host has yet to hear of."""

    step: int
    """Counted from 1."""
    numbers: distributed.Coming
    """Its loss, and the norm of its gradients."""
    batches: Sequence[Batch]
    items: Sequence[Item]


class Health:
    """Takes a run's optimizer steps, but for bad ones: those leave weights, moments and Adam's count as they were.

    A step is bad where the loss or the norm of the gradients is no finite number, or the loss a spike. All ranks see
    the same numbers. DeepSpeed leaves out steps of an infinite norm at some stages and in some precisions; here it is
    so at all. Overflows that a changing loss scale (fp16) is there to find are counted, and are no bad steps.

    Where all is whole on each rank (`whole.can_leave_out`) the device decides, and the host waits for nothing: of a GPU
    it acts on a step once the next one's gradients are on their way, or when it is to `settle`, and keeps the batches
    until then. Else it waits for the loss before each step, and the optimizer's arithmetic is not asked for a bad one.

    Args:
        progress: is told of what is left out, as checkpoints have it.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, settings: TrainSettings, progress: Progress, out: Path
    ) -> None:
        self._engine, self._settings, self._progress, self._out = engine, settings, progress, out
        self._overflows = 0  # in a row
        self._untold: _Untold | None = None
        scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # the run ends here, in one line

    def step(
        self, sums: torch.Tensor, counts: torch.Tensor, batches: Sequence[Batch], items: Sequence[Item]
    ) -> torch.Tensor:
        """Take a step whose gradients are complete, or leave it out; returns whether it is bad [] (bool). A collective.

        Args:
            sums: this rank's summed losses [terms] (fp64).
            counts: all ranks' counts [terms] (fp64).
            batches: this rank's micro-batches.
            items: the examples of the whole step.

        Raises RunError on every rank where the settings say so, or one bad step follows another.
        """
        self.settle()
        if whole.can_leave_out(self._engine):
            return self._on_device(sums, counts, batches, items)
        return sums.new_full((), self._awaited(sums, counts, batches, items), dtype=torch.bool)

    def settle(self) -> None:
        """Act on the last step if that is still to be done, so that `progress` has all of it; a collective.

        Raises RunError as `step`.
        """
        if self._untold is not None:
            (step, numbers, batches, items), self._untold = self._untold, None
            loss, norm = numbers.values()
            self._act(step, wrong_with(loss, norm, self._settings, self._progress), loss, batches, items)

    def _on_device(
        self, sums: torch.Tensor, counts: torch.Tensor, batches: Sequence[Batch], items: Sequence[Item]
    ) -> torch.Tensor:
        step, limit = self._progress.step + 1, spike(self._settings, self._progress)

        def is_bad(own_norm: torch.Tensor) -> torch.Tensor:
            """As `wrong_with`."""
            own = torch.cat([sums, own_norm.reshape(1).to(sums)])
            *totals, norm = distributed.sum_over_ranks(own).unbind()
            loss = self._loss(totals, counts)
            self._untold = _Untold(step, distributed.Coming(torch.stack([loss, norm])), batches, items)
            return ~(loss.isfinite() & norm.isfinite() & (loss <= limit))

        bad = whole.step_unless(self._engine, is_bad)
        if self._untold is not None and not self._untold.numbers.pending:
            self.settle()
        return bad

    def _awaited(
        self, sums: torch.Tensor, counts: torch.Tensor, batches: Sequence[Batch], items: Sequence[Item]
    ) -> bool:
        """As `step`, of engines that decide on the host, and look at the norm themselves."""
        loss = float(self._loss(distributed.sum_over_ranks(sums.clone()), counts))
        problem = wrong_with(loss, 0.0, self._settings, self._progress)
        scaled, before = scaling(self._engine), self._autocast_scale()
        with patch.object(self._engine.basic_optimizer, "step", _nothing) if problem else nullcontext():
            self._engine.step()
        if problem:
            set_scaling(self._engine, scaled)  # which knows nothing of losses
        elif getattr(self._engine.optimizer, "overflow", False) or self._autocast_scale() < before:
            self._overflows += 1
            if (scaled or before) and self._overflows < _SCALINGS:
                self._progress.overflows += 1
                return False
            problem = "the norm of the gradients is no finite number"
        else:
            self._overflows = 0
        self._act(self._progress.step + 1, problem, loss, batches, items)
        return problem is not None

    def _autocast_scale(self) -> float:
        """Of torch's own loss scaling (fp16 autocast at stage 0), which falls where it has left out a step; else 0."""
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        return float(scaler.get_scale()) if scaler else 0.0

    def _loss(self, totals: Iterable[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
        """The step's loss [], of all ranks' sums and counts."""
        losses = zip(self._engine.module.weights.values(), totals, counts.clamp(min=1), strict=True)
        return torch.stack([weight * total / count for weight, total, count in losses]).sum()

    def _act(
        self, step: int, problem: str | None, loss: float, batches: Sequence[Batch], items: Sequence[Item]
    ) -> None:
        """Do what is to be done on the host about a step: it is over."""
        if problem is None:
            remember(loss, self._settings, self._progress)
            return
        progress, settings, team = self._progress, self._settings, distributed.Ranks()
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
    if loss > spike(settings, progress):
        factor, recent = settings.spike_factor, progress.recent
        usual = f"the median of the last {len(recent)}, {median(recent):.4g}"
        return f"the loss is {loss:.4g}, more than {factor:g} times {usual}"
    return None


def spike(settings: TrainSettings, progress: Progress) -> float:
    """What a loss has to be above to be a spike; infinity where none is looked for."""
    factor, recent = settings.spike_factor, progress.recent
    return math.inf if factor is None or len(recent) < _LEAST else factor * median(recent)


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


def _nothing(*_: Any, **__: Any) -> None:
    """In place of the optimizer's arithmetic."""
