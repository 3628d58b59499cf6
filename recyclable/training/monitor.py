"""What people watch: scalars through DeepSpeed's monitor, and on rank 0 a progress bar, or lines where it is a log."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed
import torch
from tqdm import tqdm

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.output import say
from recyclable.planning.devices import peak_flops
from recyclable.training.flops import Work, model_flops
from recyclable.training.optimizer import learning_rate

_SILENCE_S = 60.0
"""In a log, where there is no bar, nothing is heard of a run for hardly longer than this, or than a step takes."""


class Monitor:
    """Averages losses between log points and writes named scalars (`train/...`, `eval/...`, `perf/...`) by step.

    Args:
        clock: seconds from any fixed moment on.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        settings: TrainSettings,
        label: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._settings, self._label, self._clock = engine, settings, label, clock
        self._terms = engine.module.weights
        self._flops, self._peak = model_flops(engine.module), peak_flops()
        self._bar: tqdm  # there from `bar` on
        self._latest: torch.Tensor  # tokens of the last step
        self._loss: float | None = None
        self._start, self._begun, self._spoke = 0, clock(), clock()
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self._terms), dtype=torch.float64, device=self._engine.device)
        self._counts, self._tokens = torch.zeros_like(self._sums), torch.zeros_like(self._sums[0])
        self._steps, self._waited, self._since = 0, 0.0, self._clock()
        self._now = self._since

    @contextmanager
    def bar(self, start: int) -> Iterator[None]:
        """Shows a progress bar on rank 0 while the run lasts (only where standard error is a terminal)."""
        hidden = None if distributed.is_main() else True
        total = self._settings.max_steps
        with tqdm(total=total, initial=start, desc=self._label, unit="step", disable=hidden) as self._bar:
            self._start = start
            self._begun = self._spoke = self._since = self._now = self._clock()
            yield

    def step(
        self, step: int, sums: torch.Tensor, counts: torch.Tensor, tokens: torch.Tensor, waited: float = 0.0
    ) -> None:
        """Record one step: this rank's sums [terms], all ranks' counts [terms] and tokens; a collective.

        Args:
            waited: seconds until this rank had the step's batches.
        """
        self._now = self._clock()
        self._bar.update()
        self._sums += sums
        self._counts += counts
        self._tokens += tokens
        self._latest = tokens
        self._steps += 1
        self._waited += waited
        if step % self._settings.log_every == 0 or step == self._settings.max_steps:
            self._log(step)
        elif self._in_log() and self._now - self._spoke >= _SILENCE_S:
            self._say(step)  # of rank 0 alone: the loss is the last log point's, only there ranks add theirs up

    def _log(self, step: int) -> None:
        """A log point: the means since the last one, of all ranks; a collective."""
        totals, counts = distributed.sum_over_ranks(self._sums), self._counts
        means = (totals / counts.clamp(min=1)).tolist()
        self._now = self._clock()  # only now a GPU has done what it was told
        scalars: dict[str, float] = {}
        if self._tokens.any():  # else all steps since the last log point were left out
            losses = dict(zip(self._terms, means, strict=True))
            self._loss = sum(weight * losses[term] for term, weight in self._terms.items())
            scalars = {"train/loss": self._loss, **{f"train/{term}": value for term, value in losses.items()}}
        scalars["train/learning_rate"] = learning_rate(step - 1, self._settings)
        scalars["perf/examples_per_s"] = self._steps * self._settings.train_batch_size / self._seconds()
        scalars["perf/tokens_per_s"] = self._tokens_per_s()
        if self._peak:
            work = Work(self._steps * self._settings.train_batch_size, float(self._tokens), float(counts.max()))
            peak = self._peak * distributed.world_size()
            scalars["perf/mfu"] = self._flops.of(work) / (self._seconds() * peak)
        scalars["perf/data_wait"] = self._waited / self._seconds()
        scalars["perf/peak_memory_gb"] = peak_memory() / 1e9
        norm = self._engine.get_global_grad_norm()
        if norm is not None and math.isfinite(norm) and self._latest.any():  # else the step was left out
            scalars["train/grad_norm"] = float(norm)
        self._write(step, scalars)
        if self._loss is not None:
            self._bar.set_postfix(loss=f"{self._loss:.4f}")
        if self._in_log():
            self._say(step)
        self._reset()

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Record an evaluation; the time since the last step was its own, no step's."""
        now = self._clock()
        self._since += now - self._now
        self._now = now
        if step == self._start:
            self._begun = now
        self._write(step, {f"eval/{name}": value for name, value in scores.items()})
        if self._in_log():
            self._print(step, [f"{name} {value:.4f}" for name, value in scores.items()])

    def _say(self, step: int) -> None:
        """A line on a run under way: the last loss known, tokens per second since the last log point, the time left.

        That is how long the steps left take if they take, evaluations and all, what those of this start took so far.
        """
        told = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        told.append(f"{self._tokens_per_s():,.0f} tokens/s")
        if left := self._settings.max_steps - step:
            told.append(f"{duration((self._now - self._begun) / (step - self._start) * left)} left")
        self._print(step, told)

    def _print(self, step: int, told: list[str]) -> None:
        say("  ".join([self._label, f"step {step}/{self._settings.max_steps}", *told]))
        self._spoke = self._now

    def _seconds(self) -> float:
        return max(self._now - self._since, 1e-9)

    def _tokens_per_s(self) -> float:
        return float(self._tokens) / self._seconds()

    def _in_log(self) -> bool:
        return distributed.is_main() and self._bar.disable

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if distributed.is_main():
            self._engine.monitor.write_events([(name, value, step) for name, value in scalars.items()])


class Log:
    """Lines of rank 0 on steps under way, every so many steps and at least every minute.

    Args:
        first, last: the step that it begins after, and the last one there may be.
        every: steps from one line to the next.
        silent: there is a bar instead.
        clock: seconds from any fixed moment on.
    """

    def __init__(
        self,
        label: str,
        first: int,
        last: int,
        every: int,
        silent: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._label, self._first, self._last, self._every = label, first, last, every
        self._silent, self._clock = silent, clock
        self._begun = self._spoke = clock()

    def step(self, step: int, told: str) -> None:
        """Say what is told of a step, where it is time to, and how long the steps left take if they take as long."""
        now = self._clock()
        due = step % self._every == 0 or step == self._last or now - self._spoke >= _SILENCE_S
        if self._silent or not due:
            return
        parts = [self._label, f"step {step}/{self._last}", told]
        if left := self._last - step:
            parts.append(f"{duration((now - self._begun) / (step - self._first) * left)} left")
        distributed.say("  ".join(parts))
        self._spoke = now


def peak_memory() -> float:
    """Bytes: the most that tensors have taken on this rank's GPU so far; on a CPU the most that its process has."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    """A time as people say it, by its two largest units: 40 s, 3 min, 1 h 12 min, 2 d 3 h."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    days, hours = divmod(minutes // 60, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min"
