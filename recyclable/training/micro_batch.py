"""The micro-batch of a run whose ds_config names none: found by a plan, told, and tried before anything is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import deepspeed
import numpy as np
import torch

from recyclable import distributed, machine
from recyclable.config.settings import TrainSettings
from recyclable.data.examples import Batch, Examples
from recyclable.errors import InputError
from recyclable.objectives.objective import Objective
from recyclable.planning.devices import Device, free_memory
from recyclable.planning.fitting import MICRO, STEPS, Fitter
from recyclable.planning.time import Fleet
from recyclable.planning.trace import Untraceable
from recyclable.training.evaluation import to_device
from recyclable.training.states import scaling, set_scaling
from recyclable.training.zero import bytes_held, full_shape

_PLAINLY = 0.25
"""What takes no more than this share of the free memory, by a rough guess far too high, needs no plan."""
_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Found:
    """A micro-batch that a plan has found."""

    rows: int
    share: int
    """Rows of a step that each rank has."""
    largest: Batch
    """The longest examples that it may be made of."""

    def refusal(self) -> InputError:
        """What is said where it does not fit after all."""
        smaller = max((rows for rows in range(1, self.rows) if self.share % rows == 0), default=None)
        hint = (
            f"put {MICRO} {smaller} into the ds_config" if smaller else "use more ranks, or a ds_config that saves more"
        )
        return InputError(MICRO, f"{self.rows} was planned, but a step of it does not fit in the memory: {hint}")


def find(
    objective: Objective, examples: Examples, settings: TrainSettings, ds_config: dict[str, Any], known: int | None
) -> tuple[dict[str, Any], Found | None]:
    """The ds_config with a micro-batch where memory is short, and what is to be tried; all ranks agree. A collective.

    Where the ds_config has one, or the whole share of a rank plainly fits, it comes back as it is.

    Args:
        objective: as it will be trained, its values read.
        known: the micro-batch that a run which is resumed was started with.
    """
    share = settings.train_batch_size // distributed.world_size()
    if MICRO in ds_config or STEPS in ds_config or share * distributed.world_size() != settings.train_batch_size:
        return ds_config, None
    if known is not None and share % known == 0:
        return {**ds_config, MICRO: known}, None
    fleet = _fleet(objective)
    if _plainly_fits(objective, _longest(examples, 1), share, fleet.device.memory):
        return ds_config, None
    rows = distributed.broadcast_object(
        _planned(objective, examples, settings, ds_config, fleet, share) if distributed.is_main() else None
    )
    if rows is None:
        return ds_config, None
    return {**ds_config, MICRO: rows}, Found(rows, share, _longest(examples, rows))


def verify(engine: deepspeed.DeepSpeedEngine, objective: Objective, found: Found) -> None:
    """Take a step's last two passes with the largest batch, all but the optimizer's arithmetic; a collective.

    Weights, moments and counters are as new afterwards, to the last bit: a run learns the same with and without it.

    Raises InputError where memory does not suffice.
    """
    passes, steps = objective.passes(0), engine.gradient_accumulation_steps()
    tried = min(2, steps)
    counts = {term: max(1, count) for term, count in objective.counts(found.largest).items()}
    engine.train()
    try:
        batch = to_device(found.largest, engine.device)
        with _as_before(engine), torch.random.fork_rng(_own_gpu()):
            engine.micro_steps = steps - tried
            for number in range(tried):
                sums = engine(batch, **passes[(number - tried) % len(passes)])
                engine.backward(sum(objective.weights[term] * value / counts[term] for term, value in sums.items()))
                engine.step()
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)):
            raise
        raise found.refusal() from error


def _own_gpu() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


@contextmanager
def _as_before(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """While it lasts a step takes all the memory that it takes, and leaves the engine as it was.

    In place of the optimizer's arithmetic its moments are held, where they are not there yet: DeepSpeed then copies
    weights from master copies that nobody has changed.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    counters = {name: getattr(engine, name) for name in _COUNTERS}
    scaled = scaling(engine)
    moments: list[torch.Tensor] = []

    def hold(*_: Any, **__: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if not optimizer.state.get(parameter):
                moments.extend(
                    torch.empty_like(parameter).zero_() for _ in range(2)
                )  # written to: only then it is there

    with patch.object(optimizer, "step", hold), patch.object(engine.monitor, "enabled", False):
        yield
    for name, value in counters.items():
        setattr(engine, name, value)
    set_scaling(engine, scaled)


def _longest(examples: Examples, rows: int) -> Batch:
    """A batch of the longest examples there are; the same again where there are fewer."""
    lengths = getattr(examples, "lengths", np.zeros(len(examples)))
    used = np.asarray(getattr(examples, "used", range(len(examples))))  # of others no cached teacher has told
    longest = used[np.argsort(-lengths[used], kind="stable")[:rows]].tolist()
    return examples.batch([(0, longest[number % len(longest)]) for number in range(rows)])


def _fleet(objective: Objective) -> Fleet:
    """The ranks with the memory that each of them may take: what is free, and what it has taken for the weights."""
    local = int(os.environ.get("LOCAL_SIZE", distributed.world_size()))
    on_host = free_memory()
    free: float
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        free = on_host / local + sum(bytes_held(parameter) for parameter in objective.parameters())
    each = min(distributed.Ranks().gather((free, on_host)))
    device = Device("here", each[0], 1, 1, 1, 1, 1, on_cpu=not torch.cuda.is_available())
    return Fleet(device, distributed.world_size(), max(1, distributed.world_size() // local), each[1])


def _plainly_fits(objective: Objective, row: Batch, share: int, room: float) -> bool:
    """Whether a guess that is far too high leaves most of the memory free, so that no plan is needed.

    Per parameter 40 bytes; per token 16 for each row and column of all matrices, which are what a layer makes and a
    loss over a vocabulary; per pair of tokens as many as if each head were 8 wide and kept four matrices in fp32.
    """
    shapes = [full_shape(parameter) for parameter in objective.parameters()]
    matrices = [shape for shape in shapes if len(shape) > 1]
    length = sum(tensor.shape[1] for name, tensor in row.items() if name.endswith("input_ids"))
    sides = sum(shape[0] + shape[-1] for shape in matrices)
    pairs = sum(min(shape[0], shape[-1]) for shape in matrices) / 8
    per_row = 16 * length * (sides + length * pairs)
    return 40 * sum(map(math.prod, shapes)) + share * per_row <= _PLAINLY * room


def _planned(
    objective: Objective,
    examples: Examples,
    settings: TrainSettings,
    ds_config: dict[str, Any],
    fleet: Fleet,
    share: int,
) -> int | None:
    """The largest micro-batch that fits, told; None where no plan can be made, which is told as well."""
    ds_config = machine.recomputing(ds_config, settings.gradient_checkpointing)
    try:
        evaluated, saves = settings.eval_batch_size, settings.writes_checkpoints
        fit = Fitter(objective, partial(_longest, examples), share, fleet, evaluated, saves).largest(ds_config)
    except Untraceable as error:  # the run itself may well do
        distributed.say(f"notice: no plan of the memory could be made ({error}); the micro-batch is {share}")
        return None
    taken, free = fit.memory.device / 1e9, fleet.device.memory / 1e9
    says = "" if fit.fits else ": hardly fits, a ds_config that saves more is wanted (recyclable plan)"
    distributed.say(f"micro-batch: {fit.rows} of {share} examples, {taken:.1f} of {free:.1f} GB by the plan{says}")
    return fit.rows
