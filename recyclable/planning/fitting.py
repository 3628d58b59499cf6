"""Which micro-batch fits: the largest that divides a rank's share of a step and leaves a margin of the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from recyclable import machine
from recyclable.data.examples import Batch
from recyclable.objectives.objective import Objective
from recyclable.planning.depth import LAYERS, deepen
from recyclable.planning.memory import Memory, memory, traced
from recyclable.planning.time import Fleet
from recyclable.planning.trace import Trace

MARGIN = 0.05
"""Share of the memory that is never planned for: predictions may be a few per cent too low, and allocators waste."""
MICRO, STEPS = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Fit:
    """A micro-batch with the memory that it takes."""

    rows: int
    accumulation: int
    memory: Memory
    trace: Trace
    load: float
    """Share of the memory that may be taken; it fits up to 1."""

    @property
    def fits(self) -> bool:
        """Whether it leaves the margin."""
        return self.load <= 1


@dataclass
class Fitter:
    """Tries micro-batches of one run without running it.

    Args:
        objective: the run's; it may be on the meta device.
        batch: so many rows -> the largest batch of them.
        share: rows of a step that each rank has.
        evaluated: rows of a batch in evaluation; None: no more than in training, which takes less than that.
    """

    objective: Objective
    batch: Callable[[int], Batch]
    share: int
    fleet: Fleet
    evaluated: int | None = None
    saves: bool = False
    """Whether the run writes checkpoints."""
    asked: int = 0
    """Elements of a teacher that answers before training."""
    shallow: Callable[[int], Objective] | None = None
    """The same with so few layers, where all are alike; None: all are traced."""
    layers: int = 0
    """How many there are in truth."""
    _traces: dict[Any, Trace] = field(default_factory=dict)
    _flops: dict[Any, Fraction] = field(default_factory=dict)
    """Of a layer and row."""

    def largest(self, ds_config: dict[str, Any]) -> Fit:
        """The largest micro-batch that fits; the smallest there is, where none does.

        One that the ds_config names is tried alone.
        """
        micro, steps = ds_config.get(MICRO), ds_config.get(STEPS)
        if steps and not micro:
            micro = self.share // steps
        rows = [micro] if micro else [rows for rows in range(1, self.share + 1) if self.share % rows == 0]
        found = last = self.tried(ds_config, rows[0])
        low, high = 0, len(rows)  # found is rows[low]; rows[high] does not fit
        while found.fits and high - low > 1:
            if last is found:
                middle = low + 1
            else:  # memory grows about in proportion: two that were tried tell where to try next
                growth = (last.load - found.load) / (last.rows - found.rows)
                middle = max(i for i in range(low, high) if found.load + growth * (rows[i] - rows[low]) <= 1)
            if middle == low:
                break
            further = self.tried(ds_config, rows[middle])
            if further.fits:
                low, last, found = middle, found, further
            else:
                high, last = middle, further
        return found

    def tried(self, ds_config: dict[str, Any], rows: int) -> Fit:
        """What a micro-batch of so many rows takes."""
        accumulation, on_cpu = self.share // rows, self.fleet.device.on_cpu
        training = self._traced(ds_config, rows, training=True)
        taken = memory(
            self.objective,
            self.batch(rows),
            ds_config,
            self.fleet.ranks,
            on_cpu=on_cpu,
            accumulation=accumulation,
            saves=self.saves,
            asked=self.asked,
            training=training,
            evaluation=None if self.evaluated is None else self._traced(ds_config, self.evaluated, training=False),
        )
        return Fit(rows, accumulation, taken, training, load(taken, self.fleet))

    def _traced(self, ds_config: dict[str, Any], rows: int, training: bool) -> Trace:
        again = training and machine.recomputes(ds_config)
        key = rows, again, training, machine.precision(ds_config), machine.autocast(ds_config)
        if key not in self._traces:
            batch, on_cpu = self.batch(rows), self.fleet.device.on_cpu
            found = None
            if self.shallow is not None and self.layers > LAYERS + 1:
                few = traced(self.shallow(LAYERS), batch, ds_config, on_cpu, training)
                if key[1:] not in self._flops:
                    fewer = traced(self.shallow(LAYERS - 1), batch, ds_config, on_cpu, training)
                    self._flops[key[1:]] = Fraction(few.flops - fewer.flops, rows)
                found = deepen(few, int(rows * self._flops[key[1:]]), self.layers)
            self._traces[key] = found or traced(self.objective, batch, ds_config, on_cpu, training)
        return self._traces[key]


def load(taken: Memory, fleet: Fleet) -> float:
    """What is taken of the device's memory, or of its host's if that is more, as a share of what may be."""
    of_device, of_host = taken.device / fleet.device.memory, 0.0
    if not fleet.device.on_cpu and taken.host:
        of_host = taken.host * fleet.local / max(fleet.host_memory, 1.0)
    return max(of_device, of_host) / (1 - MARGIN)
