"""How much memory a run will take on each rank, part by part, at the moment of its peak."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recyclable import machine
from recyclable.architectures.recomputing import recompute_layers
from recyclable.data.examples import Batch
from recyclable.objectives.objective import Objective
from recyclable.planning.phases import phases
from recyclable.planning.states import Held, Sizes, Zero
from recyclable.planning.trace import Trace, trace

_RECOMPUTING = "gradient_checkpointing"
PARTS = ("weights", "gradients", "optimizer", "activations", "teacher", "logits", "buckets", "checkpoint", "process")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment when it holds most.

    `host` and `nvme` are the most at any moment, which may be another one than the device's.
    """

    phase: str
    """What is being done then: start, teaching (a cached teacher answers), training, step, evaluation."""
    weights: int
    """The student's, as they are computed with, gathered ones of ZeRO-3 included."""
    gradients: int
    optimizer: int
    """Moments and fp32 master weights."""
    activations: int
    teacher: int
    """Its weights and what it computes."""
    logits: int
    """What a loss over a vocabulary makes: a chunk's logits, gradients of the last layer."""
    buckets: int
    """What ZeRO copies gradients and weights through."""
    checkpoint: int
    """A copy in host memory of weights and moments, from which a checkpoint is written while training goes on."""
    process: int
    """What the allocator keeps beside all that, and on a GPU its runtime."""
    device: int
    """In the memory that computes; the sum of the parts, those that lie elsewhere left out."""
    host: int
    """In the host's memory; on a CPU the same as `device`."""
    nvme: int


def traced(objective: Objective, batch: Batch, ds_config: dict[str, Any], on_cpu: bool, training: bool = True) -> Trace:
    """A trace as `memory` needs it; the same for all stages and offloads of one precision and one batch."""
    cast = machine.autocast(ds_config)
    with _as_it_computes(objective.student, ds_config, on_cpu):
        return trace(
            objective,
            batch,
            precision=getattr(torch, machine.precision(ds_config)),
            autocast=None if cast is None else getattr(torch, cast),
            on_cpu=on_cpu,
            training=training,
        )


@contextmanager
def _as_it_computes(student: nn.Module, ds_config: dict[str, Any], on_cpu: bool) -> Iterator[None]:
    """While it lasts, layers compute again in the backward pass where the ds_config has them do so."""
    before = {module: module.gradient_checkpointing for module in student.modules() if hasattr(module, _RECOMPUTING)}
    if machine.recomputes(ds_config):
        recompute_layers(student, machine.saves_on_host(ds_config) and not on_cpu)
    try:
        yield
    finally:
        for module, was in before.items():
            setattr(module, _RECOMPUTING, was)


def memory(
    objective: Objective,
    batch: Batch,
    ds_config: dict[str, Any],
    ranks: int,
    *,
    on_cpu: bool,
    accumulation: int = 1,
    evaluated: Batch | None = None,
    training: Trace | None = None,
    evaluation: Trace | None = None,
    saves: bool = False,
    gives_back: bool | None = None,
    asked: int = 0,
) -> Memory:
    """Predict the peak of a run; nothing is allocated, parameters may be on the meta device.

    Args:
        batch: one micro-batch as the largest of the run will be.
        ranks: over which ZeRO shares out.
        accumulation: micro-batches that make up a step.
        evaluated: the largest batch of an evaluation; None leaves evaluation out.
        training, evaluation: `traced` of the two batches, if there already.
        saves: whether checkpoints are written.
        gives_back: whether the allocator of a CPU gives back what is freed at once, as glibc does with blocks above
            MALLOC_MMAP_THRESHOLD_ where that is set, at a price; None: as it is set here. Else it keeps some.
        asked: elements of a teacher, no part of the objective, that answers before training.
    """
    training = training or traced(objective, batch, ds_config, on_cpu)
    if evaluation is None and evaluated is not None:
        evaluation = traced(objective, evaluated, ds_config, on_cpu, training=False)
    if gives_back is None:
        gives_back = "MALLOC_MMAP_THRESHOLD_" in os.environ
    passes = accumulation * len(objective.passes(0))
    zero = Zero.of(ds_config, ranks, on_cpu, accumulating=passes > 1)
    found = phases(Sizes.of(objective), zero, training, evaluation, saves, gives_back, asked)
    if on_cpu:
        found = {name: Held(held.device + held.host, nvme=held.nvme) for name, held in found.items()}
    phase, held = max(found.items(), key=lambda item: item[1].device.total())
    device = held.device.total()
    host = device if on_cpu else max(one.host.total() for one in found.values())
    parts = {part: held.device[part] + held.host[part] for part in PARTS}
    return Memory(phase, **parts, device=device, host=host, nvme=max(one.nvme.total() for one in found.values()))
