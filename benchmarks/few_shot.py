"""Few-shot distillation on the CPU: this project's training step beside a loop like the paper's released code.

    python benchmarks/few_shot.py [--quick] [--json]

32 examples per class, batch 16, fp32, dropout off, texts of like length in a step; both train on the same batches in
turns, in one process. Ours is the step that `recyclable recycle` runs with ds_configs/cpu_zero0.json (one rank has
nothing to partition), with a cached teacher and batches padded to their longest text. The peer runs the teacher in
every step with gradients on and with labels, for a loss nobody uses, on batches padded to 128 tokens; its teacher's
graph is dropped before the backward pass.

`speedup` is the peer's time over ours, the filling of the cache counted in; `speedup_without_filling` leaves it out.
`max_rel_loss_diff` is the largest relative difference of the first 20 losses.
With RECYCLABLE_DATA set, model and task are its models/minilm_l3 and tasks/chemprot; else both are made from the
documentation strings of the installed libraries. Old and new base are one here: that changes no amount of work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from recyclable import distributed
from recyclable.data.docstrings import write_docstring_world
from recyclable.data.examples import TaskExamples
from recyclable.data.order import Item, Order
from recyclable.machine import load_ds_config
from recyclable.methods.distill import Distill
from recyclable.models.tasks import task_model
from recyclable.objectives.distillation import Distillation
from recyclable.objectives.teacher_cache import TaughtExamples, TeacherCache
from recyclable.objectives.teachers import CachedTeacher, OnlineTeacher, Signals, Teacher
from recyclable.tasks.parts.fewshot import k_shot
from recyclable.tasks.parts.task import Task, load_task
from recyclable.training.engine import engine_for
from recyclable.training.feeding import StepBatches
from recyclable.training.loop import train_step
from recyclable.training.teaching import fill
from recyclable.weights import sources
from recyclable.weights.base import Base
from recyclable.weights.vocabulary import load_tokenizer

COMPARED, LENGTH = 20, 128
Step = Callable[[int, list[Item]], float]


@dataclass(frozen=True)
class Setting:
    """What is trained: a base, a task with few examples, and how."""

    base: Path
    task: Task
    examples: TaskExamples
    order: Order
    config: Distill

    def student(self) -> nn.Module:
        """The base with a fresh head; the same at every call."""
        return sources.fill(task_model(Base(self.base), self.task, self.config.seed, self.config.dropout))

    def teacher(self) -> nn.Module:
        """The base with noise on every weight and another head: as much work as a tuned one."""
        model, noise = (
            sources.fill(task_model(Base(self.base), self.task, self.config.seed + 1)),
            torch.Generator(),
        )
        noise.manual_seed(self.config.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.02)
        return model.eval()

    def objective(self, student: nn.Module, teacher: Teacher[Signals]) -> Distillation:
        """The loss of `recyclable recycle`."""
        config = self.config
        weights = {"alpha": config.alpha, "beta": config.beta, "temperature": config.temperature}
        return Distillation(student, self.task.kind, teacher, **weights)


def base_and_task(folder: Path, made_here: bool = False) -> tuple[Path, Path]:
    """The real model and task where there are any, else (or with `made_here`) ones made in `folder`."""
    data = os.environ.get("RECYCLABLE_DATA")
    if data and not made_here:
        return Path(data, "models", "minilm_l3"), Path(data, "tasks", "chemprot")
    world = write_docstring_world(folder / "world")
    return world.base, world.task


def setting(steps: int, folder: Path, base: Path, source: Path) -> Setting:
    """`steps` steps on a task's few examples; what a run writes goes to `folder`."""
    config = Distill(
        base=str(base),
        old_base=str(base),
        weights="",
        task=str(source),
        out=folder / "out",
        max_steps=steps,
        learning_rate=2e-5,
        max_length=LENGTH,
        dropout=0.0,
        group_by_length=True,
        alpha=0.9,
    )
    task = load_task(source)
    few, _ = k_shot(task.splits["train"], 32, config.seed, task.kind.strata(task.splits["train"]))
    examples = task.kind.examples(few, load_tokenizer(base), LENGTH)
    order = Order(len(examples), config.train_batch_size, config.seed, examples.lengths)
    return Setting(base, task, examples, order, config)


def measure(quick: bool) -> dict[str, float]:
    """`speedup`, `speedup_without_filling` and `max_rel_loss_diff`; seconds are reported on stderr."""
    distributed.init()
    steps = 100 if quick else 200
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(distributed.shutdown)  # NCCL would complain when all is said
        given = setting(steps, Path(folder), *base_and_task(Path(folder)))
        our_step, filling = stack.enter_context(ours(given))
        contenders = {"ours": our_step, "peer": peer(given)}
        losses: dict[str, list[float]] = {name: [] for name in contenders}
        seconds, busy = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0.0)
        for number in tqdm(range(steps), desc="few-shot steps, in turns", disable=None):
            items = given.order.step(number)
            for name in sorted(contenders, reverse=bool(number % 2)):
                begin, cpu = time.perf_counter(), time.process_time()
                losses[name].append(contenders[name](number, items))
                seconds[name] += time.perf_counter() - begin
                busy[name] += time.process_time() - cpu
    for name in contenders:
        each, cpu = (f"{1000 * spent[name] / steps:.0f} ms" for spent in (seconds, busy))
        print(f"few-shot, {name}: {each} a step, of them {cpu} of processor time", file=sys.stderr)
    print(f"few-shot, filling the cache: {filling:.2f} s for {len(given.examples)} examples", file=sys.stderr)
    a, b = (np.array(losses[name][:COMPARED]) for name in ("ours", "peer"))
    return {
        "speedup": seconds["peer"] / (seconds["ours"] + filling),
        "speedup_without_filling": seconds["peer"] / seconds["ours"],
        "max_rel_loss_diff": float(np.max(np.abs(a - b) / np.abs(b))),
    }


@contextmanager
def ours(given: Setting) -> Iterator[tuple[Step, float]]:
    """The project's step with a cached teacher, and the seconds it took to fill the cache."""
    config, ds_config, cache = given.config, load_ds_config("cpu_zero0"), TeacherCache(None)
    begin = time.perf_counter()
    used, size = given.order.used(config.max_steps), config.eval_batch_size
    fill(cache, given.examples, used, lambda: OnlineTeacher(given.teacher(), given.task.kind), size, ds_config)
    filling = time.perf_counter() - begin
    examples, objective = TaughtExamples(given.examples, cache), given.objective(given.student(), CachedTeacher())
    with engine_for(objective, config, ds_config, config.out) as engine:
        made = StepBatches(examples, given.order, objective, engine.train_micro_batch_size_per_gpu())

        def step(number: int, _: list[Item]) -> float:
            sums, counts, *_ = train_step(engine, objective, made[number], number, config)
            weights = torch.tensor(list(objective.weights.values()), dtype=torch.float64)
            return float((weights * sums / counts).sum())

        yield step, filling


def peer(given: Setting) -> Step:
    """A plain loop: whole-batch padding, the teacher anew in every step, torch's AdamW as it comes."""
    config, student, teacher = given.config, given.student(), given.teacher()
    padded = given.examples.batch([(0, row) for row in range(len(given.examples))])
    padded = {name: F.pad(t, (0, LENGTH - t.shape[1])) if t.dim() == 2 else t for name, t in padded.items()}
    matrices, rest = ([p for p in student.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.max_steps)

    def step(number: int, items: list[Item]) -> float:
        rows = [row for _, row in items]
        batch = {name: tensor[rows] for name, tensor in padded.items()}
        student.train()
        told = teacher(**batch, output_hidden_states=True)
        said = student(**batch, output_hidden_states=True)
        soft = F.softmax(told.logits.detach() / config.temperature, dim=-1)
        kd = F.kl_div(F.log_softmax(said.logits / config.temperature, dim=-1), soft, reduction="batchmean")
        first = [torch.stack([states[:, 0] for states in out.hidden_states[:-1]]) for out in (said, told)]
        patient = 0.5 * F.mse_loss(first[0], first[1].detach())
        loss = (1 - config.alpha) * said.loss + config.alpha * config.temperature**2 * kd + config.beta * patient
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main(measured: Callable[[bool], dict[str, Any]] = measure, description: str | None = __doc__) -> None:
    """Print what `measured(quick)` finds; with --json as one JSON object."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller or fewer steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measured(arguments.quick)
    print(json.dumps(figures) if arguments.json else "  ".join(f"{key} {value:.3g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
