"""The one training loop: pre-training, tuning and recycling differ in objective, examples and evaluation only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.data.examples import Examples
from recyclable.data.order import Item, Order, Steps, share_of_step
from recyclable.objectives.objective import Objective
from recyclable.training import checkpoint, micro_batch
from recyclable.training.engine import engine_for, materialize
from recyclable.training.evaluation import to_device
from recyclable.training.monitor import Monitor
from recyclable.training.optimizer import learning_rate
from recyclable.training.zero import load_trainable, own_pieces, trainable_shapes
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.files import SafetensorsWriter

Scores = dict[str, float]
Evaluate = Callable[[deepspeed.DeepSpeedEngine], Scores]


@dataclass
class Progress:
    """What a run has done so far; all of it goes into checkpoints."""

    step: int = 0
    seconds: float = 0.0
    """Spent on training steps, evaluation left out."""
    best_step: int = -1
    best: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per evaluation: step, examples, seconds and the scores."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    history: list[dict[str, float]]
    best_step: int
    tensors: Path
    """Trainable tensors at the best step (fp32 safetensors, the student's parameter names); the caller removes it."""
    final: Scores
    """What `final` scored on the best weights."""


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
    resume: bool = False,
    label: str = "",
) -> Outcome:
    """Train `objective` for `settings.max_steps` and keep the best weights; a collective.

    Args:
        evaluate: scores of the engine's model; run at step 0, every `eval_every` steps and at the end.
        select: the score whose highest value decides which step's weights are kept; None keeps the last.
        ds_config: where it names no micro-batch, one is found that fits (`training.micro_batch`).
        final: run once, on the kept weights, when training is over.
        lengths: tokens of each example, to put those of like length into one step; None takes them as they come.
        order: which examples make up which step; None: `Order` by seed and lengths.
        resume: go on from the last complete checkpoint under `out`, if there is one.
    """
    progress = Progress()
    checkpoints = out / "checkpoints"
    materialize(objective, settings, ds_config)
    known = checkpoint.micro_batch(checkpoints) if resume else None
    ds_config, found = micro_batch.find(objective, examples, settings, ds_config, known)
    with engine_for(objective, settings, ds_config, out) as engine:
        if found is not None:
            micro_batch.verify(engine, objective, found)
        monitor = Monitor(engine, settings, label)
        if resume and (state := checkpoint.load_latest(engine, checkpoints)):
            progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
        order = order or Order(len(examples), settings.train_batch_size, settings.seed, lengths)
        with monitor.bar(progress.step):
            if progress.step == 0:
                _evaluate(engine, evaluate, progress, monitor, out, select, settings)
            while progress.step < settings.max_steps:
                begin = time.perf_counter()
                losses = train_step(engine, objective, examples, order.step(progress.step), progress.step, settings)
                progress.seconds += time.perf_counter() - begin
                progress.step += 1
                monitor.step(progress.step, *losses)
                if progress.step % settings.evaluation_interval() == 0 or progress.step == settings.max_steps:
                    _evaluate(engine, evaluate, progress, monitor, out, select, settings)
                if settings.save_every and progress.step % settings.save_every == 0:
                    checkpoint.save(engine, checkpoints, vars(progress))
                    _drop_other_tensors(out, progress.best_step)
        _drop_other_tensors(out, progress.best_step)
        kept, scores = _tensors_file(out, progress.best_step), {}
        if final:
            load_trainable(objective.student, SafetensorsFile(kept))
            engine.eval()
            scores = final(engine)
    return Outcome(progress.history, progress.best_step, kept, scores)


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    objective: Objective,
    examples: Examples,
    items: list[Item],
    step: int,
    settings: TrainSettings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One optimizer step; returns this rank's summed losses [terms], all ranks' counts [terms] and tokens [] (fp64)."""
    world, accumulation = distributed.world_size(), engine.gradient_accumulation_steps()
    # Dropout is the only thing drawn from torch's generators: seeding every step makes resuming exact without state.
    torch.manual_seed(((settings.seed * 1_000_003 + step) * 65_537 + distributed.rank()) % 2**64)
    shares = share_of_step(items, distributed.rank(), world, engine.train_micro_batch_size_per_gpu())
    batches = [examples.batch(share) for share in shares]
    counted = [objective.counts(batch) for batch in batches]
    terms = list(objective.weights)
    own = [sum(c[term] for c in counted) for term in terms] + [sum(int(b["attention_mask"].sum()) for b in batches)]
    totals = distributed.sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=engine.device))
    counts, tokens = totals[:-1], totals[-1]
    divisors = dict(zip(terms, counts.clamp(min=1).float(), strict=True))
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    engine.train()
    summed = torch.zeros(len(terms), dtype=torch.float64, device=engine.device)
    for batch in batches:
        batch = to_device(batch, engine.device)
        for of_pass in objective.passes(step):
            sums = engine(batch, **of_pass)
            # DeepSpeed averages over ranks and accumulation steps: undo it, the whole step's counts divide instead.
            loss = sum(objective.weights[term] * value / divisors[term] for term, value in sums.items())
            engine.backward(loss * world * accumulation)
            engine.step()
            for term, value in sums.items():
                summed[terms.index(term)] += value.detach().double()
    return summed, counts, tokens


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
    scores = evaluate(engine)
    examples = progress.step * settings.train_batch_size
    progress.history.append({"step": progress.step, "examples": examples, "seconds": progress.seconds, **scores})
    monitor.scores(progress.step, scores)
    score = None if select is None else scores[select]
    last = progress.step == settings.max_steps
    if last if score is None else progress.best is None or score > progress.best:
        progress.best, progress.best_step = score, progress.step
        _keep_tensors(engine.module, _tensors_file(out, progress.best_step))


def _keep_tensors(objective: Objective, path: Path) -> None:
    """Every rank writes what it keeps of the trainable parameters into one file; a collective."""
    writer = SafetensorsWriter(path, trainable_shapes(objective.student), team=distributed.Ranks())
    for name, start, values in own_pieces(objective.student):
        writer.write(name, values, start)
    writer.close()


def _tensors_file(out: Path, step: int) -> Path:
    return out / f"best-{step:08d}.safetensors"


def _drop_other_tensors(out: Path, step: int) -> None:
    """Remove the weights of steps that no checkpoint and no result refers to any more."""
    if distributed.is_main():
        for path in out.glob("best-*.safetensors"):
            if path != _tensors_file(out, step):
                path.unlink()
    distributed.barrier()
