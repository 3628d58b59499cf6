"""What people watch: scalars through DeepSpeed's monitor, a progress bar and a line per evaluation on rank 0."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from tqdm import tqdm

from recyclable.config import TrainSettings
from recyclable.training import distributed
from recyclable.training.flops import flops_per_token, peak_flops
from recyclable.training.optimizer import learning_rate


class Monitor:
    """Averages losses between log points and writes named scalars (`train/...`, `eval/...`, `perf/...`) by step."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, settings: TrainSettings, label: str) -> None:
        self._engine, self._settings, self._label = engine, settings, label
        self._terms = engine.module.weights
        self._flops, self._peak = flops_per_token(engine.module, len(engine.module.passes(0))), peak_flops()
        self._bar: tqdm | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self._terms), dtype=torch.float64, device=self._engine.device)
        self._counts, self._tokens = torch.zeros_like(self._sums), torch.zeros_like(self._sums[0])
        self._steps, self._since = 0, time.perf_counter()

    @contextmanager
    def bar(self, start: int) -> Iterator[None]:
        """Shows a progress bar on rank 0 while the run lasts (only where standard error is a terminal)."""
        hidden = None if distributed.is_main() else True
        total = self._settings.max_steps
        with tqdm(total=total, initial=start, desc=self._label, unit="step", disable=hidden) as self._bar:
            yield

    def step(self, step: int, sums: torch.Tensor, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        """Record one step: this rank's sums [terms], all ranks' counts [terms] and tokens; a collective."""
        self._bar.update()
        self._sums += sums
        self._counts += counts
        self._tokens += tokens
        self._steps += 1
        if step % self._settings.log_every == 0 or step == self._settings.max_steps:
            means = (distributed.sum_over_ranks(self._sums) / self._counts.clamp(min=1)).tolist()
            losses = dict(zip(self._terms, means, strict=True))
            total = sum(weight * losses[term] for term, weight in self._terms.items())
            seconds = time.perf_counter() - self._since
            scalars = {"train/loss": total, **{f"train/{term}": value for term, value in losses.items()}}
            scalars["train/learning_rate"] = learning_rate(step - 1, self._settings)
            scalars["perf/examples_per_s"] = self._steps * self._settings.train_batch_size / seconds
            scalars["perf/tokens_per_s"] = float(self._tokens) / seconds
            if self._peak:
                scalars["perf/mfu"] = (
                    scalars["perf/tokens_per_s"] * self._flops / (self._peak * distributed.world_size())
                )
            norm = self._engine.get_global_grad_norm()
            if norm is not None:
                scalars["train/grad_norm"] = float(norm)
            self._write(step, scalars)
            self._bar.set_postfix(loss=f"{total:.4f}")
            self._reset()

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Record an evaluation."""
        self._write(step, {f"eval/{name}": value for name, value in scores.items()})
        if distributed.is_main() and self._bar.disable:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"{self._label}  step {step}/{self._settings.max_steps}  {shown}", flush=True)
        self._since = time.perf_counter()

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if distributed.is_main():
            self._engine.monitor.write_events([(name, value, step) for name, value in scalars.items()])
