"""A rank's own adapters of a stack: their steps, evaluations and states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from recyclable import distributed, machine
from recyclable.data.alike import alike
from recyclable.data.examples import Batch
from recyclable.data.order import Item
from recyclable.errors import RunError
from recyclable.objectives.stacked import NOBODY, Part, StackedTasks
from recyclable.ranges import BACKWARD, DATA, FORWARD, OPTIMIZER, phase
from recyclable.training import health
from recyclable.training.asking import Asked
from recyclable.training.evaluation import to_device
from recyclable.training.events import RunScalars
from recyclable.training.optimizer import build_optimizer, learning_rate
from recyclable.training.pieces import MOMENTS, WEIGHT, Kept, Piece
from recyclable.training.stacked_run import StackedRun
from recyclable.weights.team import ALONE


class OwnRuns:
    """A rank's own adapters, with what trains them.

    Args:
        computes: `tasks` on its device, as `training.engine.frozen` has it.
        runs: adapter -> run.
    """

    def __init__(
        self,
        tasks: StackedTasks,
        computes: Callable[..., Any],
        device: torch.device | str,
        runs: dict[int, StackedRun],
        ds_config: dict[str, Any],
    ) -> None:
        self._tasks, self._computes, self._device, self.runs = tasks, computes, device, runs
        self.stage = machine.zero_stage(ds_config)
        self._rows = ds_config.get("train_micro_batch_size_per_gpu")
        self._together = self.stage == 3 and distributed.world_size() > 1
        self._orders = {number: run.order() for number, run in runs.items()}
        self._lengths = {number: run.data.train.lengths for number, run in runs.items()}
        self._optimizers = {number: build_optimizer(run.model, run.settings) for number, run in runs.items()}
        self._scalars: dict[int, RunScalars] = {}

    @property
    def live(self) -> int:
        """How many runs are still to be trained."""
        return sum(run.live for run in self.runs.values())

    def step(self, step: int) -> None:
        """One optimizer step of every run that is not done."""
        begin, live = time.perf_counter(), {number: run for number, run in self.runs.items() if run.live}
        with phase(DATA):
            drawn = {number: self._orders[number].step(step) for number in live}
            shares = in_passes(drawn, self._lengths, torch.device(self._device).type, self._rows)
            passes = [[(number, live[number].data.train.batch(chosen)) for number, chosen in each] for each in shares]
        counts = dict.fromkeys(live, 0)
        for part in (part for each in passes for part in each):
            counts[part[0]] += self._tasks.counts(part)
        self._tasks.train()
        told: list[torch.Tensor] = []
        for each in passes:
            told.append(self._pass([(number, to_device(batch, self._device)) for number, batch in each], counts))
        self._end_phase()
        sums = dict.fromkeys(live, 0.0)
        for (number, _), value in zip(
            chain.from_iterable(passes), torch.cat(told).tolist() if told else [], strict=True
        ):
            sums[number] += value
        with phase(OPTIMIZER):
            norms = self._clipped(live)
        for number, run in live.items():
            batches = [batch for each in passes for of, batch in each if of == number]
            items = [item for each in shares for of, chosen in each if of == number for item in chosen]
            with phase(OPTIMIZER):
                self._update(number, run, step, sums[number] / max(1, counts[number]), norms[number], batches, items)
            run.progress.seconds += time.perf_counter() - begin

    def _pass(self, parts: list[Part], counts: dict[int, int]) -> torch.Tensor:
        """Forward and backward of some parts; returns their summed losses, [parts]."""
        self._tell(2)
        with phase(FORWARD):
            sums = self._computes(parts=parts)
            divisors = torch.tensor([max(1, counts[number]) for number, _ in parts], device=sums.device)
            loss = (sums / divisors).sum()
        with phase(BACKWARD):
            loss.backward()
        return sums.detach()

    def _clipped(self, live: dict[int, StackedRun]) -> dict[int, float]:
        """Clip the gradients of each run; returns their norms, for which a GPU is waited once."""
        limits = {number: run.settings.max_grad_norm or float("inf") for number, run in live.items()}
        norms = [nn.utils.clip_grad_norm_(run.trained.values(), limits[number]) for number, run in live.items()]
        return dict(zip(live, torch.stack(norms).tolist(), strict=True)) if norms else {}

    def _update(
        self,
        number: int,
        run: StackedRun,
        step: int,
        loss: float,
        norm: float,
        batches: list[Batch],
        items: list[Item],
    ) -> None:
        settings, progress = run.settings, run.progress
        if problem := health.wrong_with(loss, norm, settings, progress):
            settings.out.mkdir(exist_ok=True)
            health.keep_batch(settings.out, step + 1, problem, loss, batches, items, ALONE)
            progress.skipped.append(step + 1)
            if settings.bad_step == "stop" or health.too_many(settings, progress):
                run.problem = f"{problem} at step {step + 1}"
                return
        optimizer, rate = self._optimizers[number], learning_rate(step, run.settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if not problem:
            optimizer.step()
            health.remember(loss, settings, progress)
        optimizer.zero_grad()
        progress.step += 1
        if not problem and (progress.step % settings.log_every == 0 or not run.live):
            scalars = {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": rate}
            self._write(number, run, scalars)

    def evaluate(self, step: int) -> None:
        """Score the runs that are due after a step on dev, and keep those weights that are the best so far."""
        self._tasks.eval()
        for number, run in self.runs.items():
            if not run.due(step):
                continue
            try:
                scores = self._scores(number, run, run.data.dev, [run.data.metric])
            except RunError as error:  # of this run alone
                run.problem, run.best = str(error), run.best or run.copied()
                continue
            progress = run.progress
            progress.scored(scores, run.settings.train_batch_size)
            self._write(number, run, {f"eval/{name}": value for name, value in scores.items()})
            score = scores[run.data.metric]
            if progress.best is None or score > progress.best:
                progress.best, progress.best_step = score, progress.step
                run.best = run.copied()
        self._end_phase()

    def finish(self) -> None:
        """Score the best weights on test."""
        self._tasks.eval()
        for number, run in self.runs.items():
            for name, parameter in run.trained.items():
                parameter.data.copy_(run.best[name])
            if run.data.test is not None and run.problem is None:
                run.final = self._scores(number, run, run.data.test, None)
        self._end_phase()
        for scalars in self._scalars.values():
            scalars.close()

    def _scores(self, number: int, run: StackedRun, split: Any, wanted: list[str] | None) -> dict[str, float]:
        def answers(batch: Batch | None = None, **asked: Any) -> Any:
            self._tell(1)
            return self._computes(batch, adapter=number, **asked)

        ask = Asked(answers, run.settings.eval_batch_size, self._device, ALONE)
        return run.data.task.kind.scores(ask, split, run.data.task.labels, wanted)

    def copies(self) -> list[Piece]:
        """What a checkpoint has of this rank's runs."""
        pieces = []
        for number, run in self.runs.items():
            for name, parameter in run.trained.items():
                state = self._optimizers[number].state.get(parameter, {})
                kept = {WEIGHT: parameter, **{kind: state[kind] for kind in MOMENTS if kind in state}}
                tensors = {kind: tensor.detach().flatten().to("cpu", copy=True) for kind, tensor in kept.items()}
                pieces.append(Piece(run.now(name), 0, tensors, float(state.get("step", 0))))
                pieces.append(Piece(run.at_best(name), 0, {WEIGHT: run.best[name].flatten()}, 0.0))
        return pieces

    def restore(self, kept: Kept) -> None:
        """Have this rank's runs go on with what a checkpoint has of them."""
        weights = kept.kind(WEIGHT)
        for number, run in self.runs.items():
            for name, parameter in run.trained.items():
                parameter.data.copy_(weights.read(run.now(name)).view_as(parameter))
                run.best[name] = weights.read(run.at_best(name)).view(parameter.shape).clone()
                if steps := kept.steps(run.now(name)):
                    moments = {kind: kept.kind(kind).read(run.now(name)).view_as(parameter) for kind in MOMENTS}
                    step = torch.tensor(steps, dtype=torch.float32, device=parameter.device)
                    state = {kind: moment.to(parameter.device).clone() for kind, moment in moments.items()}
                    self._optimizers[number].state[parameter] = {"step": step, **state}

    def _tell(self, work: int) -> int:
        """What the ranks are about to compute at most, under ZeRO-3: 2 with a backward pass, 1 without, 0 nothing."""
        if not self._together:
            return work
        found = torch.tensor(work, device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def _end_phase(self) -> None:
        """Under ZeRO-3: compute along until no rank has anything left."""
        ids = torch.zeros(1, 4, dtype=torch.long, device=self._device)
        part: Part = (NOBODY, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        while self._together and (work := self._tell(0)):
            with torch.set_grad_enabled(work == 2):
                sums = self._computes(parts=[part])
            if work == 2:
                sums.sum().backward()

    def _write(self, number: int, run: StackedRun, scalars: dict[str, float]) -> None:
        if number not in self._scalars:
            self._scalars[number] = RunScalars(run.settings.out / "tensorboard")
        self._scalars[number].write_events([(name, value, run.progress.step) for name, value in scalars.items()])


def in_passes(
    items: dict[int, list[Item]], lengths: Mapping[int, np.ndarray], device: str, rows: int | None
) -> list[list[tuple[int, list[Item]]]]:
    """The examples of a step of several runs, in passes of like length; of each run's in the order of their lengths.

    Args:
        lengths: run -> tokens of each of its examples.
        device: its type.
        rows: examples of a pass at most; None: any number.
    """
    drawn = [(number, item) for number, chosen in items.items() for item in chosen]
    passes = []
    for places in alike(np.array([lengths[number][item[1]] for number, item in drawn]), device, rows):
        parts: dict[int, list[Item]] = {}
        for number, item in (drawn[place] for place in places):
            parts.setdefault(number, []).append(item)
        passes.append(list(parts.items()))
    return passes
