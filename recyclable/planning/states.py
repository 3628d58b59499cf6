"""What DeepSpeed's ZeRO holds of weights, gradients and optimizer on one rank, as 0.19.8 allocates it.

Read from `runtime/zero/stage_1_and_2.py`, `stage3.py`, `partitioned_param_coordinator.py`, `bf16_optimizer.py` and
`fp16/unfused_optimizer.py`; AdamW has two fp32 moments. On a CPU a buffer takes the pages that were ever written to, on
a GPU all of it. Sizes are in bytes, counts in elements.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recyclable import machine
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import FrozenModel
from recyclable.planning.swapping import Swapping, largest_sub_group

FP32 = 4


@dataclass(frozen=True)
class Zero:
    """The settings of a ds_config that memory depends on, DeepSpeed's defaults filled in."""

    stage: int
    ranks: int
    on_cpu: bool
    size: int
    """Of a weight that is computed with."""
    master: bool
    """Whether the optimizer has fp32 weights of its own."""
    summed: int
    """Of a gradient as it is accumulated."""
    reduce_bucket: int
    buckets: int
    persistent: int
    """ZeRO-3 keeps parameters up to this many elements whole."""
    prefetch: int
    max_live: int
    reuse: int
    sub_group: int
    optimizer_on: str
    """none, cpu or nvme"""
    parameters_on: str
    swapping: Swapping
    accumulating: bool
    """Whether several passes make up a step."""

    @classmethod
    def of(cls, ds_config: dict[str, Any], ranks: int, on_cpu: bool, accumulating: bool) -> Zero:
        """Read a ds_config."""
        ds_config = machine.as_run(ds_config, ranks)
        zero = {key.removeprefix("stage3_"): v for key, v in (ds_config.get("zero_optimization") or {}).items()}
        stage = zero.get("stage", 0)
        size = FP32 if machine.precision(ds_config) == "float32" else 2
        summed = (ds_config.get("data_types") or {}).get("grad_accum_dtype")
        overlap = zero.get("overlap_comm")
        optimizer_on, parameters_on = machine.homes(ds_config)

        return cls(
            stage=stage,
            ranks=ranks,
            on_cpu=on_cpu,
            size=size,
            # ZeRO-3 in fp32 would do without, but compares a device with its name, and so never does
            master=stage > 0 or size < FP32,
            summed=size if summed is None else FP32 if summed in ("fp32", "float32") else 2,
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=2 if (stage == 3 if overlap is None else overlap) and stage < 3 else 1,
            persistent=int(zero.get("param_persistence_threshold", 1e5)),
            prefetch=int(zero.get("prefetch_bucket_size", 5e7)),
            max_live=int(zero.get("max_live_parameters", 1e9)),
            reuse=int(zero.get("max_reuse_distance", 1e9)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            optimizer_on=optimizer_on,
            parameters_on=parameters_on,
            swapping=Swapping.of(zero),
            accumulating=accumulating,
        )


@dataclass(frozen=True)
class Sizes:
    """The parameters of an objective, in elements."""

    trained: dict[str, int]
    frozen: dict[str, int]
    """The student's that are not trained."""
    teacher: dict[str, int]
    decayed: frozenset[str]
    """Those in the optimizer's first group."""
    borrowed: frozenset[str]
    """Those that modules compute with which they do not belong to."""

    @classmethod
    def of(cls, objective: Objective) -> Sizes:
        """Tied parameters count once."""
        taught = {
            parameter
            for module in objective.modules()
            if isinstance(module, FrozenModel)
            for parameter in module.parameters()
        }
        names = {parameter: name for name, parameter in objective.named_parameters()}
        shapes = {p: getattr(p, "ds_shape", p.shape) for p in names}  # of what ZeRO-3 has shared out: whole
        return cls(
            trained={name: shapes[p].numel() for p, name in names.items() if p.requires_grad},
            frozen={name: shapes[p].numel() for p, name in names.items() if not p.requires_grad and p not in taught},
            teacher={name: shapes[p].numel() for p, name in names.items() if not p.requires_grad and p in taught},
            decayed=frozenset(name for p, name in names.items() if len(shapes[p]) > 1),
            borrowed=frozenset(names[parameter] for _, parameter in objective.borrowed()),
        )

    def all(self) -> dict[str, int]:
        """Of all parameters."""
        return {**self.trained, **self.frozen, **self.teacher}

    def groups(self) -> list[dict[str, int]]:
        """The optimizer's groups, in its order."""
        first = {name: n for name, n in self.trained.items() if name in self.decayed}
        second = {name: n for name, n in self.trained.items() if name not in self.decayed}
        return [group for group in (first, second) if group]


Parts = Counter
"""Part -> bytes."""


@dataclass
class Held:
    """Bytes by part, and by where they lie."""

    device: Parts[str] = field(default_factory=Counter)
    host: Parts[str] = field(default_factory=Counter)
    nvme: Parts[str] = field(default_factory=Counter)

    def __add__(self, other: Held) -> Held:
        return Held(self.device + other.device, self.host + other.host, self.nvme + other.nvme)

    def at(self, home: str) -> Parts[str]:
        """Where an offload setting puts things."""
        return {"none": self.device, "cpu": self.host, "nvme": self.nvme}[home]


def share(sizes: dict[str, int], ranks: int) -> int:
    """Elements of which ZeRO-3 gives each rank a range, tensor by tensor."""
    return sum(-(-n // ranks) for n in sizes.values())


def steady(sizes: Sizes, zero: Zero) -> Held:
    """What is there from the first step's end to the run's, whatever is being done."""
    held = Held()
    ranks = zero.ranks if zero.stage else 1
    own = _stepped(sizes, zero, ranks)
    for part, of in (("weights", {**sizes.trained, **sizes.frozen}), ("teacher", sizes.teacher)):
        if zero.stage < 3:
            held.device[part] += zero.size * sum(of.values())
            continue
        held.at(zero.parameters_on)[part] += zero.size * share(of, ranks)
        if ranks > 1 or (zero.parameters_on != "none" and not zero.on_cpu):
            held.device[part] += zero.size * sum(n for n in of.values() if n <= zero.persistent)
    optimizer = held.at(zero.optimizer_on)
    optimizer["optimizer"] += (2 * FP32 + (FP32 if zero.master else 0)) * own
    if zero.optimizer_on != "none":
        largest = max(sizes.trained.values(), default=0)
        held.host["gradients"] += FP32 * own
        if zero.stage < 3:
            held.host["buckets"] += zero.size * (own + largest)
            held.device["buckets"] += zero.size * largest
    if "nvme" in (zero.optimizer_on, zero.parameters_on):
        held.host += _swapped(sizes, zero, ranks)
    if zero.stage == 3:
        where = held.device if zero.optimizer_on == "none" else held.host
        where["gradients"] += zero.summed * own
        if not zero.on_cpu:
            held.device["buckets"] += zero.size * zero.reduce_bucket
    return held


def _swapped(sizes: Sizes, zero: Zero, ranks: int) -> Parts[str]:
    """In the host's memory, of what is on NVMe."""
    trained, other = (
        [-(-n // ranks) for n in of.values()] for of in (sizes.trained, {**sizes.frozen, **sizes.teacher})
    )
    sub_group = largest_sub_group(
        ([-(-n // ranks) for n in group.values()] for group in sizes.groups()), zero.sub_group
    )
    found: Parts[str] = Counter()
    if zero.parameters_on == "nvme":
        found += zero.swapping.of_parameters(trained, other, zero.size, sub_group)
    if zero.optimizer_on == "nvme":
        found += zero.swapping.of_states(FP32, sub_group)
    return found


def copied(sizes: Sizes, zero: Zero) -> int:
    """What one rank copies for a checkpoint (`training.states.copies`): fp32 weights and moments of its share."""
    return 3 * FP32 * _stepped(sizes, zero, zero.ranks)


def _stepped(sizes: Sizes, zero: Zero, ranks: int) -> int:
    """Elements of what one of so many ranks has to do in the optimizer's step."""
    return share(sizes.trained, ranks) if zero.stage == 3 else -(-sum(sizes.trained.values()) // ranks)


def in_partition(sizes: Sizes, ranks: int) -> frozenset[str]:
    """The parameters of which some lies in one rank's part under ZeRO-1 and 2: of the rank that has most."""
    names: list[list[str]] = []
    held, ranges = np.zeros(ranks, dtype=np.int64), []
    for group in sizes.groups():
        ends = np.cumsum([0, *group.values()])
        starts = np.arange(ranks) * -(-ends[-1] // ranks)
        first = np.searchsorted(ends[1:], starts, "right")  # the first that ends behind where a part starts
        last = np.searchsorted(ends[:-1], starts + -(-ends[-1] // ranks), "left")
        last = np.maximum(first, last)
        held += ends[last] - ends[first]
        names.append(list(group))
        ranges.append((first, last))
    if not names or not held.any():
        return frozenset()
    rank = int(held.argmax())
    return frozenset(
        name for group, (first, last) in zip(names, ranges, strict=True) for name in group[first[rank] : last[rank]]
    )
