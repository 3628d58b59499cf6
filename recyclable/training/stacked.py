"""Trains several adapters on one frozen base at once: each by its own settings, as if it were alone.

Ranks share out the adapters, not their batches: an adapter, its optimizer and its steps are one rank's, and no gradient
is sent. The base is as the ds_config has it: whole on every rank or, under ZeRO-3, in partitions that ranks gather
together, so that a rank that has nothing to compute computes along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from tqdm import tqdm

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.launching import guard, preemption
from recyclable.objectives.stacked import StackedTasks
from recyclable.ranges import EVALUATION, SAVING, phase
from recyclable.training.checkpoint.choosing import to_go_on_from
from recyclable.training.checkpoint.record import Progress, Record
from recyclable.training.checkpoint.saving import Saver
from recyclable.training.engine import frozen
from recyclable.training.monitor import Log
from recyclable.training.profiling import profiling
from recyclable.training.stacked_run import StackedRun, layout
from recyclable.training.stacked_steps import OwnRuns
from recyclable.weights.sources import fill


def train_stacked(
    tasks: StackedTasks,
    runs: Sequence[StackedRun],
    ds_config: dict[str, Any],
    saver: Saver,
    *,
    out: Path,
    reads: dict[str, str],
    resume: bool = False,
) -> None:
    """Train every run to its end; afterwards each knows its history, its best weights and their scores, on every rank.

    Args:
        runs: in the order of the stack's adapters, the same on every rank.
        ds_config: its `train_micro_batch_size_per_gpu` is how many rows of all adapters are in a pass at most.
        reads: what is read -> content digest.
        resume: go on from the newest whole checkpoint under `out`, if there is one.
    """
    own = [number for number, rank in enumerate(shared_out(runs)) if rank == distributed.rank()]
    with frozen(tasks, ds_config) as (computes, device):
        for number in own:
            fill(nn.ParameterList(runs[number].trained.values()))
            for parameter in runs[number].trained.values():
                parameter.data = parameter.data.to(device)
        # ZeRO-3's hooks are the modules' own; an engine that has no optimizer refuses a backward pass.
        computes = computes.module if isinstance(computes, DeepSpeedEngine) else computes
        stack = OwnRuns(tasks, computes, device, {number: runs[number] for number in own}, ds_config)
        step = _resumed(stack, runs, out, reads) if resume else 0
        last = max(run.settings.max_steps for run in runs)
        quiet = None if distributed.is_main() else True
        label = f"stack {out.name}"
        with (
            tqdm(total=last, initial=step, desc=label, unit="step", disable=quiet) as bar,
            profiling(out, label, step, last) as profile,
        ):
            log = Log(label, step, last, min(run.settings.log_every for run in runs), silent=not bar.disable)
            preemption.hold()
            if step == 0:
                stack.evaluate(step)
            _, live = _of_all(False, stack.live)
            while live:
                profile.at(step)
                stack.step(step)
                step += 1
                with phase(EVALUATION):
                    stack.evaluate(step)
                bar.update()
                guard.tell(step=step)
                end, live = _of_all(saver.ending, stack.live)
                log.step(step, f"{live} of {len(runs)} runs under way")
                with phase(SAVING):
                    saver.after(step, end, partial(_record, stack, runs, step, reads), stack.copies)
            saver.wait()
        stack.finish()
    _tell_all(runs, own)


def shared_out(runs: Sequence[StackedRun]) -> list[int]:
    """The rank of each run: the longest first, each to the rank that has least to do."""
    costs = [
        run.settings.max_steps * run.settings.train_batch_size * float(np.mean(run.data.train.lengths)) for run in runs
    ]
    ranks, load = [0] * len(runs), [0.0] * distributed.world_size()
    for number in sorted(range(len(runs)), key=lambda number: -costs[number]):
        ranks[number] = load.index(min(load))
        load[ranks[number]] += costs[number]
    return ranks


def _of_all(ending: bool, live: int) -> tuple[bool, int]:
    """Whether any rank is ending, and how many runs of all ranks are still to be trained; a collective."""
    found_ending, found_live = distributed.sum_over_ranks(torch.tensor([float(ending), float(live)])).tolist()
    return bool(found_ending), int(found_live)


def _record(stack: OwnRuns, runs: Sequence[StackedRun], step: int, reads: dict[str, str]) -> Record:
    """A checkpoint's record of now; a collective."""
    told = distributed.Ranks().gather({run.name: asdict(run.progress) for run in stack.runs.values()})
    done = {name: Progress(**progress) for each in told for name, progress in each.items()}
    return Record(
        progress=Progress(step),
        reads=reads,
        layout=layout(runs),
        scaling={},
        zero_stage=stack.stage,
        precision="fp32",
        ranks=distributed.world_size(),
        micro_batch=1,
        runs=done,
    )


def _resumed(stack: OwnRuns, runs: Sequence[StackedRun], out: Path, reads: dict[str, str]) -> int:
    """The step of the newest whole checkpoint, once each run has been brought to where it was; a collective."""
    found = to_go_on_from(out, layout(runs), reads)
    if found is None:
        return 0
    if found.record.runs.keys() != {run.name for run in runs}:
        raise InputError(found.folder, f"tells of the runs {sorted(found.record.runs)}, expected each of the stack's")
    for run in stack.runs.values():
        run.progress = found.record.runs[run.name]
        if run.progress.step < found.record.progress.step and not run.done:
            run.problem = f"it was given up before, after step {run.progress.step}"
    stack.restore(found.files)
    distributed.say(f"resumed at step {found.record.progress.step}, written on {found.record.ranks} ranks")
    return found.record.progress.step


def _tell_all(runs: Sequence[StackedRun], own: Sequence[int]) -> None:
    """Have every rank know what has become of every run; a collective."""
    told = distributed.Ranks().gather(
        {number: (runs[number].progress, runs[number].best, runs[number].final, runs[number].problem) for number in own}
    )
    for number, found in (pair for each in told for pair in each.items()):
        runs[number].progress, runs[number].best, runs[number].final, runs[number].problem = found
