"""The one training loop: pre-training, tuning and recycling differ in objective, examples and evaluation only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.data.examples import Examples
from recyclable.data.order import Order, Steps
from recyclable.disks import require_alike
from recyclable.errors import RunError
from recyclable.launching import guard, preemption
from recyclable.objectives.objective import Objective
from recyclable.ranges import BACKWARD, DATA, EVALUATION, FORWARD, OPTIMIZER, SAVING, phase
from recyclable.training import best, micro_batch, states
from recyclable.training.checkpoint.choosing import known_micro_batch, to_go_on_from
from recyclable.training.checkpoint.record import Progress, Record
from recyclable.training.checkpoint.saving import Saver
from recyclable.training.engine import engine_for, materialize
from recyclable.training.evaluation import to_device
from recyclable.training.feeding import Fed, StepBatches, feeding
from recyclable.training.health import Health
from recyclable.training.monitor import Monitor
from recyclable.training.optimizer import learning_rate
from recyclable.training.profiling import profiling
from recyclable.training.zero import load_trainable

Scores = dict[str, float]
Evaluate = Callable[[deepspeed.DeepSpeedEngine], Scores]
History = list[dict[str, float]]
"""A row per evaluation: step, examples, seconds, scores."""
Digests = dict[str, str]
"""What a run reads, as messages call it -> content digest."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    history: History
    best_step: int
    tensors: Path
    """Trainable tensors at the best step (fp32 safetensors, the student's parameter names); the caller removes it."""
    final: Scores
    """What `final` scored on the best weights."""
    skipped: list[int]
    """Steps that were left out as bad, counted from 1."""
    stopped_early: bool
    """Whether it has taken fewer than `max_steps`."""


def train(
    objective: Objective,
    examples: Examples,
    evaluate: Evaluate,
    settings: TrainSettings,
    ds_config: dict[str, Any],
    *,
    out: Path,
    select: str | None = None,
    final: Evaluate | None = None,
    lengths: np.ndarray | None = None,
    order: Steps | None = None,
    reads: Callable[[], Digests] = dict,
    stopped: Callable[[History], bool] = lambda _: False,
    resume: bool = False,
    label: str = "",
) -> Outcome:
    """Train `objective` for `settings.max_steps` at most and keep the best weights; a collective.

    Args:
        evaluate: scores of the engine's model; run at step 0, every `eval_every` steps and at the end.
        select: the score whose highest value decides which step's weights are kept; None keeps the last.
        ds_config: where it names no micro-batch, one is found that fits (`training.micro_batch`).
        final: run once, on the kept weights, when training is over.
        lengths: tokens of each example, to put those of like length into one step; None takes them as they come.
        order: which examples make up which step; None: `Order` by seed and lengths.
        reads: asked once the models are read, the same on every rank; a run is not resumed on other content.
        stopped: whether a run of such evaluations has stopped early, the same on every rank.
        resume: go on from the newest whole checkpoint under `out`, if there is one.
    """
    saving = (settings.save_every, settings.save_every_minutes, settings.save_total_limit)
    materialize(objective, settings, ds_config)
    known = known_micro_batch(out) if resume else None
    ds_config, tried = micro_batch.find(objective, examples, settings, ds_config, known)
    with engine_for(objective, settings, ds_config, out) as engine, Saver(out, *saving) as saver:
        if settings.save_every or settings.save_every_minutes:
            states.require_known(engine)
        if tried is not None:
            micro_batch.verify(engine, objective, tried)
        monitor, found = Monitor(engine, settings, label), reads()
        require_alike(found)
        progress = _resumed(engine, out, found) if resume else Progress()
        order = order or Order(len(examples), settings.train_batch_size, settings.seed, lengths)
        health = Health(engine, settings, progress, out)
        preemption.hold()  # until the run's directory is let go: from here on there is something to keep
        batches = StepBatches(examples, order, objective, engine.train_micro_batch_size_per_gpu())
        with (
            feeding(batches, settings, ds_config, progress.step) as feed,
            monitor.bar(progress.step),
            profiling(out, label, progress.step, settings.max_steps) as profile,
        ):
            if progress.step == 0:
                _evaluate(engine, evaluate, progress, monitor, out, select, settings)
            while progress.step < settings.max_steps and not stopped(progress.history):
                profile.at(progress.step)
                begin, ending = time.perf_counter(), saver.ending
                with phase(DATA):
                    fed = feed.next()
                sums, counts, tokens, ends = train_step(engine, objective, fed, progress.step, settings, health, ending)
                del fed  # evaluations and checkpoints have the memory
                progress.seconds += time.perf_counter() - begin
                progress.step += 1
                monitor.step(progress.step, sums, counts, tokens, feed.waited)
                if progress.step % settings.evaluation_interval() == 0 or progress.step == settings.max_steps:
                    health.settle()
                    _evaluate(engine, evaluate, progress, monitor, out, select, settings)
                guard.tell(step=progress.step)
                end = bool(ends.value()) or (saver.ending and distributed.world_size() == 1)
                record, pieces = partial(_record, engine, progress, found, health), partial(states.copies, engine)
                with phase(SAVING):
                    saver.after(progress.step, end, record, pieces)
        saver.wait()
        kept, scores = best.result(best.tensors_file(out, progress.best_step), progress.best_digest), {}
        if distributed.is_main():
            best.drop(out, {progress.best_step}, settings.max_steps)
        if final:
            load_trainable(objective.student, kept)
            engine.eval()
            scores = _finite(final(engine), progress.best_step)
    early = progress.step < settings.max_steps
    return Outcome(progress.history, progress.best_step, kept.path, scores, progress.skipped, early)


def _resumed(engine: deepspeed.DeepSpeedEngine, out: Path, reads: Digests) -> Progress:
    """What the newest whole checkpoint says, once the engine has been brought to where it was; a collective."""
    found = to_go_on_from(out, states.trained_shapes(engine), reads)
    if found is None:
        return Progress()
    progress = found.record.progress
    states.restore(engine, found.files)
    states.set_progress(engine, progress.step, found.record.scaling)
    distributed.say(f"resumed at step {progress.step}, written on {found.record.ranks} ranks")
    return progress


def _record(engine: deepspeed.DeepSpeedEngine, progress: Progress, reads: Digests, health: Health) -> Record:
    """A checkpoint's record of now; a collective."""
    health.settle()
    return Record(
        progress=Progress(**asdict(progress)),
        reads=reads,
        layout=states.trained_shapes(engine),
        scaling=states.scaling(engine),
        zero_stage=engine.zero_optimization_stage(),
        precision="bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        ranks=distributed.world_size(),
        micro_batch=engine.train_micro_batch_size_per_gpu(),
    )


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    objective: Objective,
    fed: Fed,
    step: int,
    settings: TrainSettings,
    health: Health | None = None,
    ending: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, distributed.Coming]:
    """One optimizer step; returns this rank's summed losses [terms], all ranks' counts [terms] and tokens [] (fp64).

    All of them zero where the step is left out. And whether any rank was ending.

    Args:
        fed: what this rank has of the step.
        health: leaves out a bad step; None: nobody looks.
        ending: this rank was asked to end, or could not write its checkpoint: all ranks learn of it at the same step.
    """
    world, accumulation = distributed.world_size(), engine.gradient_accumulation_steps()
    # Dropout is the only thing drawn from torch's generators: seeding every step makes resuming exact without state.
    torch.manual_seed(((settings.seed * 1_000_003 + step) * 65_537 + distributed.rank()) % 2**64)
    terms = list(objective.weights)
    own = torch.cat([fed.counts, fed.counts.new_tensor([ending])])
    totals = distributed.sum_over_ranks(to_device({"own": own}, engine.device)["own"])
    counts, tokens, ends = totals[:-2], totals[-2], distributed.Coming(totals[-1])
    divisors = dict(zip(terms, counts.clamp(min=1).float(), strict=True))
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    engine.train()
    summed = torch.zeros(len(terms), dtype=torch.float64, device=engine.device)
    for batch in fed.batches:
        on_device = to_device(batch, engine.device)
        for of_pass in objective.passes(step):
            with phase(FORWARD):
                sums = engine(on_device, **of_pass)
                # DeepSpeed averages over ranks and accumulation steps: undo it, the whole step's counts divide instead.
                loss = sum(objective.weights[term] * value / divisors[term] for term, value in sums.items())
            with phase(BACKWARD):
                engine.backward(loss * world * accumulation)
            for term, value in sums.items():
                summed[terms.index(term)] += value.detach().double()
            with phase(OPTIMIZER):
                if health is not None and engine.is_gradient_accumulation_boundary():
                    bad = health.step(summed, counts, fed.batches, fed.items)
                    summed, counts, tokens = (each.masked_fill(bad, 0) for each in (summed, counts, tokens))
                else:
                    engine.step()
    return summed, counts, tokens, ends


def _evaluate(
    engine: deepspeed.DeepSpeedEngine,
    evaluate: Evaluate,
    progress: Progress,
    monitor: Monitor,
    out: Path,
    select: str | None,
    settings: TrainSettings,
) -> None:
    engine.eval()
    with phase(EVALUATION):
        scores = _finite(evaluate(engine), progress.step)
    progress.scored(scores, settings.train_batch_size)
    monitor.scores(progress.step, scores)
    score = None if select is None else scores[select]
    last = progress.step == settings.max_steps
    if last if score is None else progress.best is None or score > progress.best:
        progress.best, progress.best_step = score, progress.step
        progress.best_digest = best.keep(engine.module.student, best.tensors_file(out, progress.step))


def _finite(scores: Scores, step: int) -> Scores:
    """The scores; RunError, on every rank as all have the same, where one is no finite number."""
    for name, score in scores.items():
        if not math.isfinite(score):
            raise RunError(f"weights of step {step}", f"their {name} is {score}: they are damaged, there is no result")
    return scores
